"""Mixture of experts on the device: router, experts that are resident there, and the branch around them."""

from __future__ import annotations

from typing import cast

import torch

from ktcore.backend import Capabilities, LoadRequest, Module, Supported, Unsupported
from ktcore.backend.branches import MOE, moe_branch
from ktcore.backend.loading import on_device, optional
from ktcore.ops.moe import ExpertsSpec, MoESpec, RouterSpec, route
from ktcore_sim.base import FLOAT_BYTES, SimImplementation, kernels


class SimRouter(SimImplementation):
    """Scores, groups and choice as torch operators on the stream; the host learns nothing of the choice."""

    id = "sim.router"
    spec_type = RouterSpec
    handles = frozenset(
        {
            "score",
            "choice_bias",
            "groups",
            "groups_kept",
            "group_score",
            "renormalise",
            "renorm_eps",
            "scale",
        }
    )

    def supports(self, spec: RouterSpec, device: Capabilities) -> Supported | Unsupported:
        """Both scores, both group scores."""
        if spec.score not in ("softmax", "sigmoid") or spec.group_score not in ("max", "top2_sum"):
            return Unsupported(f"scores {spec.score} in groups by {spec.group_score}")
        return super().supports(spec, device)

    def load(self, request: LoadRequest) -> SimRouterModule:
        """Dequantise the router's matrix."""
        return SimRouterModule(request)

    def packed_bytes(self, spec: RouterSpec, stored_bytes: int) -> int:
        """Float32."""
        return FLOAT_BYTES * spec.experts * (spec.hidden + spec.choice_bias)


class SimRouterModule:
    """x float32 [T, hidden] -> ids int64 [T, top_k], weights float32 [T, top_k]."""

    def __init__(self, request: LoadRequest) -> None:
        self._spec = cast(RouterSpec, request.spec)
        self._weight = on_device(request, "weight").t().contiguous()
        self._bias = optional(request, "bias") if self._spec.choice_bias else None

    def __call__(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return route(torch.mm(x, self._weight), self._spec, self._bias)


class SimExperts(SimImplementation):
    """All experts in one launch, for those that a rule makes resident."""

    id = "sim.experts"
    spec_type = ExpertsSpec
    handles = frozenset({"weight_on_input"})

    def load(self, request: LoadRequest) -> SimExpertsModule:
        """Dequantise expert by expert: the peak is the result and one expert."""
        return SimExpertsModule(request)

    def packed_bytes(self, spec: ExpertsSpec, stored_bytes: int) -> int:
        """Float32."""
        return FLOAT_BYTES * 3 * spec.experts * spec.hidden * spec.intermediate


class SimExpertsModule:
    """x float32 [T, hidden], ids int64 [T, k], weights float32 [T, k] -> float32 [T, hidden]."""

    def __init__(self, request: LoadRequest) -> None:
        self._spec = cast(ExpertsSpec, request.spec)
        self._gate, self._up, self._down = (self._stack(request, role) for role in ("gate", "up", "down"))

    def __call__(self, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        s = self._spec
        result = kernels().experts(x, ids, weights, self._gate, self._up, self._down, s.activation, s.weight_on_input)
        return cast(torch.Tensor, result)

    @staticmethod
    def _stack(request: LoadRequest, role: str) -> torch.Tensor:
        stored = request.weights[role]
        out = torch.empty(stored.shape, device=request.runtime.device)
        for e in range(stored.shape[0]):
            out[e].copy_(stored.part(e).tensor())
        return out


class SimMoE(SimImplementation):
    """Composed; the shared part runs while routed experts on the host compute."""

    id = "sim.moe"
    spec_type = MoESpec
    handles = MOE - {"early_router"}

    def load(self, request: LoadRequest) -> Module:
        """Nothing to pack: the parts hold the weights."""
        return moe_branch(request)
