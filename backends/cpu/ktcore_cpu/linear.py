"""Linear projection on the native quantised kernels."""

from __future__ import annotations

from typing import Any

import torch

from ktcore.backend import Capabilities, LoadRequest, Supported, Unsupported
from ktcore.ops.linear import LinearSpec, capped
from ktcore_cpu import packing
from ktcore_cpu.packings import Packs


class CpuLinear(Packs):
    """Packs into panels of 32 rows; 8-bit activations in groups of 16 unless the option `activations` is "f32"."""

    id = "cpu.linear"
    spec_type = LinearSpec
    handles = frozenset({"bias", "softcap"})
    options = packing.OPTIONS

    def supports(self, spec: LinearSpec, device: Capabilities) -> Supported | Unsupported:
        """Every native weight format."""
        return packing.supports_formats(spec)

    def packed_bytes(self, spec: LinearSpec, stored_bytes: int) -> int:
        """Stored bytes, rows padded to whole panels."""
        return packing.padded_bytes(spec.out_features, stored_bytes, spec.formats())

    def load(self, request: LoadRequest) -> CpuLinearModule:
        """Pack the weight."""
        return CpuLinearModule(request)


class CpuLinearModule:
    """float32 [T, in] -> float32 [T, out]."""

    def __init__(self, request: LoadRequest) -> None:
        from ktcore_cpu import _native

        self._call = _native.linear
        self._pool: Any = request.runtime.pool  # type: ignore[attr-defined]
        self._weight = packing.pack(request, "weight")
        self._bias = packing.vector(request.weights, "bias")
        self._bias_ptr = 0 if self._bias is None else self._bias.ctypes.data
        self._exact = packing.exact(request)
        self._spec: LinearSpec = request.spec  # type: ignore[assignment]

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        x = packing.rows(x, self._spec.in_features)
        out = torch.empty(x.shape[0], self._spec.out_features)
        self._call(self._pool, self._weight, x.data_ptr(), out.data_ptr(), x.shape[0], self._bias_ptr, self._exact)
        return capped(out, self._spec.softcap)
