"""Kimi delta attention as one native call: projections, convolutions, recurrence, gated norm, output; with states."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from ktcore.backend import Capabilities, LoadRequest, Supported, Unsupported
from ktcore.ops.kda import KimiDeltaSpec
from ktcore_cpu import packing
from ktcore_cpu.delta import FLOAT_BYTES, LANES, CpuGatedDeltaNetModule
from ktcore_cpu.packings import Packs

if TYPE_CHECKING:
    from ktcore_cpu import _native

PARTS = ("q", "k", "v", "f_a", "f_b", "b", "g_a", "g_b", "o")


class CpuKimiDelta(Packs):
    """Up to 4 new tokens of a sequence go through the recurrence, more by chunks of 16; the two round differently.

    States are float32 slots: the convolutions' last inputs and a matrix a head.
    """

    id = "cpu.kimi_delta_attention"
    spec_type = KimiDeltaSpec
    handles = frozenset({"decay_log", "lower_bound", "norm", "norm.offset", "residual", "out_norm.offset"})
    fused = True
    options = packing.OPTIONS

    def supports(self, spec: KimiDeltaSpec, device: Capabilities) -> Supported | Unsupported:
        """Every native weight format; a head width that is a multiple of 16."""
        if spec.head_dim % LANES or spec.head_dim > 1024 or spec.heads > 1024:
            return Unsupported(f"heads whose width is no multiple of {LANES}, or more than 1024 of them or of values")
        if not 2 <= spec.conv_width <= 16:
            return Unsupported("a convolution that is not 2 to 16 tokens wide")
        return packing.supports_formats(spec)

    def state_bytes(self, spec: KimiDeltaSpec) -> int:
        """As float32."""
        return FLOAT_BYTES * spec.state.values

    def load(self, request: LoadRequest) -> CpuKimiDeltaModule:
        """Pack the nine projections."""
        return CpuKimiDeltaModule(request)


class CpuKimiDeltaModule(CpuGatedDeltaNetModule):
    """The same slots around another block; states behind some of a step's tokens are not kept."""

    keeps_states = False

    def __init__(self, request: LoadRequest) -> None:
        spec: KimiDeltaSpec = request.spec  # type: ignore[assignment]
        self._name, self._hidden = request.name, spec.hidden
        self._shapes = spec.state.shapes
        self._conv = self._state = torch.empty(0)
        self._held = torch.empty(0, dtype=torch.int64)
        self._block = _block(request, spec)  # type: ignore[assignment]


def _vector(request: LoadRequest, role: str) -> np.ndarray:
    return np.ascontiguousarray(request.weights[role].tensor().float().numpy())


def _block(request: LoadRequest, spec: KimiDeltaSpec) -> _native.KimiDeltaBlock:
    from ktcore_cpu import _native

    decay = _vector(request, "decay")
    rates = np.exp(decay) if spec.decay_log else -decay
    inner = spec.heads * spec.head_dim
    return _native.KimiDeltaBlock(
        request.runtime.pool,  # type: ignore[attr-defined]
        *(packing.pack(request, f"{part}.weight") for part in PARTS),
        heads=spec.heads,
        dim=spec.head_dim,
        width=spec.conv_width,
        conv=np.concatenate([_vector(request, f"conv_{role}").reshape(inner, spec.conv_width) for role in "qkv"]),
        rates=rates.reshape(-1),
        dt_bias=_vector(request, "dt_bias"),
        bound=spec.lower_bound or 0.0,
        out_norm=packing.norm_weight(request.weights, "out_norm.weight", spec.out_norm),
        out_eps=spec.out_norm.eps,
        norm=packing.norm_weight(request.weights, "norm.weight", spec.norm),
        norm_eps=spec.norm.eps if spec.norm else 0.0,
        residual=spec.residual,
        exact=packing.exact(request),
    )
