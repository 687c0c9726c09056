"""Gated MLP, composed of the projections that the rules chose."""

from __future__ import annotations

from ktcore.backend import LoadRequest, Module
from ktcore.backend.branches import MLP, mlp_branch
from ktcore.ops.mlp import MLPSpec
from ktcore_sim.base import SimImplementation, kernels


class SimMLP(SimImplementation):
    """Activation and product in one launch."""

    id = "sim.mlp"
    spec_type = MLPSpec
    handles = MLP

    def load(self, request: LoadRequest) -> Module:
        """Nothing to pack: the parts hold the weights."""
        return mlp_branch(request, kernels().gated)
