"""References of the mixture-of-experts operators."""

from __future__ import annotations

from typing import cast

import torch

from ktcore.backend.branches import MOE, moe_branch, step_ids
from ktcore.backend.implementation import LoadRequest, Module
from ktcore.backend.reference.base import FLOAT_BYTES, ReferenceImplementation, loaded
from ktcore.ops.linear import linear
from ktcore.ops.moe import ExpertsSpec, MoESpec, RouterSpec, route, routed_experts


class ReferenceRouter(ReferenceImplementation):
    """Logits and choice in float32."""

    id = "reference.router"
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
            "logit_bias",
            "on_logits",
            "expert_scale",
            "by_token",
            "root_softplus",
        }
    )

    def load(self, request: LoadRequest) -> Module:
        spec = cast(RouterSpec, request.spec)
        weight = loaded(request, "weight")
        bias = loaded(request, "bias") if spec.choice_bias else None
        logit_bias = loaded(request, "logit_bias") if spec.logit_bias else None
        scales = loaded(request, "expert_scale") if spec.expert_scale else None
        if spec.by_token:
            table = loaded(request, "table").long()
            return lambda x, step: route(
                linear(x.float(), weight, logit_bias), spec, None, scales, table[step_ids(request.runtime, step)]
            )
        return lambda x: route(linear(x.float(), weight, logit_bias), spec, bias, scales)

    def packed_bytes(self, spec: RouterSpec, stored_bytes: int) -> int:
        own = spec.experts * (spec.hidden + spec.choice_bias + spec.logit_bias + spec.expert_scale)
        return FLOAT_BYTES * (own + spec.by_token * spec.top_k)


class ReferenceExperts(ReferenceImplementation):
    """All experts in float32, one after the other."""

    id = "reference.experts"
    spec_type = ExpertsSpec
    handles = frozenset({"weight_on_input", "bias", "clamped", "clamped.plus", "clamped.after"})

    def load(self, request: LoadRequest) -> Module:
        spec = cast(ExpertsSpec, request.spec)
        gate, up, down = (_by_expert(request, role) for role in ("gate", "up", "down"))
        biases = None
        if spec.bias:
            biases = (loaded(request, "gate_bias"), loaded(request, "up_bias"), loaded(request, "down_bias"))
        return lambda x, ids, weights: routed_experts(x, ids, weights, gate, up, down, spec, biases)

    def packed_bytes(self, spec: ExpertsSpec, stored_bytes: int) -> int:
        biases = spec.bias * (2 * spec.intermediate + spec.hidden)
        return FLOAT_BYTES * spec.experts * (3 * spec.hidden * spec.intermediate + biases)


class ReferenceMoE(ReferenceImplementation):
    """Composed of router, experts and the shared MLP."""

    id = "reference.moe"
    spec_type = MoESpec
    handles = MOE

    def load(self, request: LoadRequest) -> Module:
        return moe_branch(request)


def _by_expert(request: LoadRequest, role: str) -> torch.Tensor:
    """A stack of experts, dequantised one at a time to keep the peak at the result plus one expert."""
    weight = request.weights[role]
    out = torch.empty(weight.shape, device=request.runtime.device)
    for e in range(weight.shape[0]):
        out[e] = weight.part(e).tensor()
    return out
