"""Gated MLP as one native call: norm, gate and up, activation, down, residual."""

from __future__ import annotations

import torch

from ktcore.backend import Capabilities, LoadRequest, Supported, Unsupported
from ktcore.ops.mlp import MLPSpec
from ktcore_cpu import packing
from ktcore_cpu.expert_biases import CLAMPED, clamp_of, unsupported_clamp
from ktcore_cpu.norm import PostNorm
from ktcore_cpu.packings import Packs


class CpuMLP(Packs):
    """Fused: quantises the activations once for gate and up, and again between the activation and down."""

    id = "cpu.mlp"
    spec_type = MLPSpec
    handles = frozenset({"norm", "norm.offset", "residual", "post_norm", "post_norm.offset"}) | CLAMPED
    fused = True
    options = packing.OPTIONS

    def supports(self, spec: MLPSpec, device: Capabilities) -> Supported | Unsupported:
        """Every native weight format."""
        return unsupported_clamp(spec.clamped) or packing.supports_formats(spec)

    def load(self, request: LoadRequest) -> CpuMLPModule:
        """Pack the three matrices."""
        return CpuMLPModule(request)


class CpuMLPModule:
    """float32 [T, hidden] -> float32 [T, hidden]."""

    def __init__(self, request: LoadRequest) -> None:
        from ktcore_cpu import _native

        spec: MLPSpec = request.spec  # type: ignore[assignment]
        self._hidden = spec.hidden
        self._block = _native.MLPBlock(
            request.runtime.pool,  # type: ignore[attr-defined]
            packing.pack(request, "gate.weight"),
            packing.pack(request, "up.weight"),
            packing.pack(request, "down.weight"),
            norm=packing.norm_weight(request.weights, "norm.weight", spec.norm),
            norm_eps=spec.norm.eps if spec.norm else 0.0,
            activation=spec.activation,
            residual=spec.residual and spec.post_norm is None,
            exact=packing.exact(request),
            clamp=clamp_of(spec.clamped),
        )
        self._finish = PostNorm(request, spec.post_norm, spec.residual) if spec.post_norm else None

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        x = packing.rows(x, self._hidden)
        out = torch.empty_like(x)
        self._block.forward(x.data_ptr(), out.data_ptr(), x.shape[0])
        return out if self._finish is None else self._finish(x, out)
