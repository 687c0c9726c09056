"""Gated MLP, composed of the projections that the rules chose."""

from __future__ import annotations

from typing import cast

import torch

from ktcore.backend import LoadRequest
from ktcore.ops.mlp import MLPSpec
from ktcore_sim.base import SimImplementation, kernels


class SimMLP(SimImplementation):
    """Activation and product in one launch."""

    id = "sim.mlp"
    spec_type = MLPSpec

    def load(self, request: LoadRequest) -> SimMLPModule:
        """Nothing to pack: the parts hold the weights."""
        return SimMLPModule(request)


class SimMLPModule:
    """float32 [T, hidden] -> float32 [T, hidden]."""

    def __init__(self, request: LoadRequest) -> None:
        self._spec = cast(MLPSpec, request.spec)
        self._parts = request.children

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        spec, parts = self._spec, self._parts
        n = parts["norm"](x) if spec.norm else x
        y = parts["down"](kernels().gated(parts["gate"](n), parts["up"](n), spec.activation))
        y = parts["post_norm"](y) if spec.post_norm else y
        return cast(torch.Tensor, x + y if spec.residual else y)
