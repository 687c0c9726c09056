"""RMSNorm as one native call."""

from __future__ import annotations

from typing import Any

import torch

from ktcore.backend import Capabilities, Implementation, LoadRequest, Supported, Unsupported
from ktcore.ops.norm import RMSNormSpec
from ktcore_cpu import packing


class CpuRMSNorm(Implementation):
    """Over the last axis, with a weight or without, zero-centred or not."""

    id = "cpu.rms_norm"
    spec_type = RMSNormSpec
    handles = frozenset({"offset"})

    def supports(self, spec: RMSNormSpec, device: Capabilities) -> Supported | Unsupported:
        """All of them."""
        return Supported()

    def load(self, request: LoadRequest) -> CpuRMSNormModule:
        """Read the weight."""
        return CpuRMSNormModule(request)


class CpuRMSNormModule:
    """float32 [..., dim] -> the same shape."""

    def __init__(self, request: LoadRequest) -> None:
        from ktcore_cpu import _native

        spec: RMSNormSpec = request.spec  # type: ignore[assignment]
        self._call = _native.rms_norm
        self._pool: Any = request.runtime.pool  # type: ignore[attr-defined]
        self._weight: Any = packing.norm_weight(request.weights, "weight", spec)
        self._eps = spec.eps

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        x = x.float().contiguous()
        out = torch.empty_like(x)
        self._call(
            self._pool, x.data_ptr(), self._weight, self._eps, out.data_ptr(), x.numel() // self._weight.shape[0]
        )
        return out


class PostNorm:
    """The end of a branch whose result is normed before x is added: y [T, hidden] -> norm(y), or x + norm(y)."""

    def __init__(self, request: LoadRequest, spec: RMSNormSpec, residual: bool) -> None:
        from ktcore_cpu import _native

        self._call = _native.rms_norm
        self._pool: Any = request.runtime.pool  # type: ignore[attr-defined]
        self._weight: Any = packing.norm_weight(request.weights, "post_norm.weight", spec)
        self._eps = spec.eps
        self._residual = residual

    def __call__(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        out = torch.empty_like(y)
        self._call(self._pool, y.data_ptr(), self._weight, self._eps, out.data_ptr(), y.shape[0])
        return out.add_(x) if self._residual else out
