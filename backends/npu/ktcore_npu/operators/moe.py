"""Mixture of experts: the router, over the vendor's two gating operators, and the branch.

`npu_moe_gating_top_k(x, k, *, bias, k_group, group_count, group_select_mode, renorm, norm_type, out_flag,
routed_scaling_factor, eps) -> (y, expert_idx int32, out)`: at most 2048 experts; norm_type 1 is a sigmoid whose chosen
values are always renormalised, 0 a softmax whose are not; group_select_mode 1 sums a group's two best, 0 takes its
best; more than 2 experts a group, and groups aligned to 32 within 2048. `npu_moe_gating_top_k_softmax(x, finished, k)
-> (y, expert_idx int32, row_idx)`: k at most 1024, not renormalised. (op-plugin, pages of these names.) Neither page
says which of equal experts is chosen. Among 32 neighbours it is the lowest, as AscendC's page of Sort32 has it; over
more of them, and what becomes of a bias of -inf, is not verified. A model that depends on it takes `reference.router`.
"""

from __future__ import annotations

from typing import Any, cast

import torch

from ktcore.backend import LoadRequest, Module
from ktcore.backend.branches import MOE, moe_branch
from ktcore.backend.loading import on_device, optional
from ktcore.ops.moe import MoESpec, RouterSpec, route
from ktcore_npu.operators.base import FLOAT_BYTES, NpuImplementation, npu

MOST_EXPERTS, MOST_CHOSEN = 2048, 1024


class NpuRouter(NpuImplementation):
    """Softmax, sigmoid, groups, biases, choice by logits. Logits in float32: a choice hangs by a hair.

    What neither gating operator computes (`gating` says which) runs on torch's operators on the device.
    """

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
        }
    )

    def load(self, request: LoadRequest) -> Module:
        """The weight stays float32."""
        spec, ops = cast(RouterSpec, request.spec), npu(request).ops
        weight = on_device(request, "weight").t().contiguous()
        bias = on_device(request, "bias") if spec.choice_bias else None
        logit_bias = optional(request, "logit_bias") if spec.logit_bias else None
        operator = gating(spec)

        def run(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            logits = torch.mm(x, weight)
            logits = logits if logit_bias is None else logits + logit_bias
            if operator == "npu_moe_gating_top_k":
                return _top_k(ops, logits, spec, bias)
            if operator == "npu_moe_gating_top_k_softmax":
                found, ids, _ = ops.npu_moe_gating_top_k_softmax(logits, None, k=spec.top_k)
                return ids.long(), _weighed(found, spec)
            return route(logits, spec, bias)

        return run

    def packed_bytes(self, spec: RouterSpec, stored_bytes: int) -> int:
        """Float32."""
        return FLOAT_BYTES * spec.experts * (spec.hidden + spec.choice_bias + spec.logit_bias)


class NpuMoE(NpuImplementation):
    """Composed; the shared part runs while routed experts on the host compute."""

    spec_type = MoESpec
    handles = MOE

    def load(self, request: LoadRequest) -> Module:
        """Nothing to pack: the parts hold the weights."""
        return moe_branch(request)


def gating(spec: RouterSpec) -> str | None:
    """The operator that computes the spec; None where neither does."""
    if spec.on_logits or spec.experts > MOST_EXPERTS:
        return None
    if spec.score == "softmax" and spec.groups == 1 and not spec.choice_bias:
        return "npu_moe_gating_top_k_softmax" if spec.top_k <= MOST_CHOSEN else None
    a_group = spec.experts // spec.groups
    aligned = spec.groups == 1 or (a_group > 2 and -(-a_group // 32) * 32 * spec.groups <= MOST_EXPERTS)
    # a sigmoid's weights come out renormalised
    weights = spec.score == "softmax" or spec.renormalise
    enough = spec.top_k <= a_group * spec.groups_kept
    # groups that are out count as 0 with "max", which a negative biased score would lose to
    plain = spec.groups == 1 or spec.group_score == "top2_sum" or not spec.choice_bias
    return "npu_moe_gating_top_k" if aligned and weights and enough and plain else None


def _top_k(
    ops: Any, logits: torch.Tensor, spec: RouterSpec, bias: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    sigmoid = spec.score == "sigmoid"
    found, ids, _ = ops.npu_moe_gating_top_k(
        logits,
        spec.top_k,
        bias=bias,
        k_group=spec.groups_kept,
        group_count=spec.groups,
        group_select_mode=int(spec.group_score == "top2_sum"),
        renorm=0,
        norm_type=int(sigmoid),
        out_flag=False,
        routed_scaling_factor=spec.scale if sigmoid else 1.0,
        eps=spec.renorm_eps,
    )
    return ids.long(), found if sigmoid else _weighed(found, spec)


def _weighed(weights: torch.Tensor, spec: RouterSpec) -> torch.Tensor:
    if spec.renormalise:
        weights = weights / (weights.sum(-1, keepdim=True) + spec.renorm_eps)
    return weights * spec.scale
