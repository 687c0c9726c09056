"""Mixture of experts: router, routed experts and the branch that holds them; one set of specs serves every family."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from ktcore.ops.base import Spec
from ktcore.ops.linear import LinearSpec
from ktcore.ops.mlp import ClampedGLU, MLPSpec, within
from ktcore.ops.norm import RMSNormSpec


@dataclass(frozen=True)
class RouterSpec(Spec):
    """Weights `weight` [experts, hidden]; with `choice_bias` also `bias` [experts], with `logit_bias` also
    `logit_bias` [experts], with `expert_scale` also `expert_scale` [experts], with `by_token` also `table` [by_token,
    top_k].

    Call: x float32 [T, hidden] -> (expert ids int64 [T, top_k], weights float32 [T, top_k]); with `by_token` it is
    (x, step).
    Order: logits -> scores -> + bias (for the choice only) -> group filter -> top-k -> weights from the unbiased
    scores -> renormalise -> * scale (DeepSeek-V3, arXiv 2412.19437, section 2.1.2, generalised).
    Of equals the lowest ids win: among groups by their scores, and among experts by what the choice is made of. A tie
    is no accident of the last bit: experts of a pruned or merged model may be equal in all of their weights, and every
    implementation must then choose the same ones.

    Attributes:
        groups, groups_kept: experts lie in `groups` equal groups, of which the best `groups_kept` stay; 1, 1 for none.
        group_score: "max" masks the others to 0 (DeepSeek-V2), "top2_sum" to -inf (DeepSeek-V3).
        renorm_eps: added to the sum of the chosen weights before the division.
        logit_bias: a bias is added to the logits themselves (gpt-oss), other than `choice_bias`.
        on_logits: the choice is by logits, and scores are computed of the chosen ones alone: softmax runs over them
            (gpt-oss, LLaMA 4, SmallThinker). Not together with groups or `choice_bias`.
        expert_scale: each expert has a factor of its own, which multiplies its weight last of all (Gemma-4).
        by_token: rows of a table that holds the experts of each token id, in place of a choice (DeepSeek-V4's first
            layers); their scores are weights as usual. 0 for none. Not together with what changes a choice.
        root_softplus: a score is sqrt(log(1 + exp(logit))), and `score` has no meaning (DeepSeek-V4).
    """

    op: ClassVar[str] = "router"
    hidden: int
    experts: int
    top_k: int
    weight_format: str
    score: Literal["softmax", "sigmoid"] = "softmax"
    choice_bias: bool = False
    groups: int = 1
    groups_kept: int = 1
    group_score: Literal["max", "top2_sum"] = "max"
    renormalise: bool = False
    renorm_eps: float = 0.0
    scale: float = 1.0
    logit_bias: bool = False
    on_logits: bool = False
    expert_scale: bool = False
    by_token: int = 0
    root_softplus: bool = False


@dataclass(frozen=True)
class ExpertsSpec(Spec):
    """Weights `gate` and `up` [experts, intermediate, hidden], `down` [experts, hidden, intermediate].

    With `bias` also `gate_bias` and `up_bias` [experts, intermediate] and `down_bias` [experts, hidden].

    Call: x float32 [T, hidden], ids int64 [T, k], weights float32 [T, k] -> float32 [T, hidden], the weighted sum. A
    negative id means that the expert is resident elsewhere and adds nothing here.

    Attributes:
        weight_on_input: the weight multiplies the expert's input instead of its output (LLaMA 4).
        clamped: replaces act(gate) * up; `activation` has no meaning then.
    """

    op: ClassVar[str] = "experts"
    hidden: int
    intermediate: int
    experts: int
    top_k: int
    activation: str
    gate_format: str
    up_format: str
    down_format: str
    weight_on_input: bool = False
    bias: bool = False
    clamped: ClampedGLU | None = None


@dataclass(frozen=True)
class MoESpec(Spec):
    """A residual branch: y = x + experts(n, *router(n)) + shared(n) with n = norm(x). Call: [T, hidden] -> [T, hidden].

    With `early_router` the call is (x, before) -> [T, hidden], and the router sees `before` [T, hidden], the residual
    stream as it was before the layer's attention, without a norm (SmallThinker). With `router.by_token` it is
    (x, step); not both. With `out_scale` a weight `out_scale` [1] of its own.

    Attributes:
        shared: one ungated MLP as wide as all shared experts together; None where the family has none.
        shared_gate: [1, hidden] linear whose sigmoid scales the shared part (Qwen2-MoE, Qwen3-Next).
        shared_apart: the shared part reads x itself, through a norm of its own, and may have another one of its result:
            a dense MLP beside the experts (Gemma-4).
        router_norm: the router reads x through this norm instead of n.
        routed_norm: of the routed experts' sum; post_norm: of the branch's result before x is added.
        out_scale: a stored factor multiplies the end result, x included.
    """

    op: ClassVar[str] = "moe"
    hidden: int
    router: RouterSpec
    experts: ExpertsSpec
    shared: MLPSpec | None = None
    shared_gate: LinearSpec | None = None
    norm: RMSNormSpec | None = None
    residual: bool = True
    early_router: bool = False
    shared_apart: bool = False
    router_norm: RMSNormSpec | None = None
    routed_norm: RMSNormSpec | None = None
    post_norm: RMSNormSpec | None = None
    out_scale: bool = False


def by_token(spec: Spec) -> bool:
    """Whether a branch, or the one between streams, goes by token ids, so that it is called with the step."""
    inner = spec.children().get("branch", spec)
    return isinstance(inner, MoESpec) and inner.router.by_token > 0


def route(
    logits: torch.Tensor,
    spec: RouterSpec,
    bias: torch.Tensor | None,
    scales: torch.Tensor | None = None,
    named: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Choose experts from logits [T, experts] -> (ids int64 [T, k], weights float32 [T, k]).

    Args:
        bias: [experts], the choice bias; the logits hold theirs already.
        scales: [experts], each expert's own factor.
        named: int64 [T, k], ids that are known without a choice.
    """
    ids, weights = _chosen(logits, spec, bias, named)
    return ids, weights if scales is None else weights * scales[ids]


def _chosen(
    logits: torch.Tensor, spec: RouterSpec, bias: torch.Tensor | None, named: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    logits = logits.float()
    if named is not None:
        return named, _weighed(scored(logits, spec).gather(-1, named), spec)
    if spec.on_logits:
        ids = _highest(logits, spec.top_k)
        values = logits.gather(-1, ids)
        return ids, _weighed(scored(values, spec), spec)
    scores = scored(logits, spec)
    choice = scores if bias is None else scores + bias
    if spec.groups > 1:
        choice = _keep_best_groups(choice, spec)
    ids = _highest(choice, spec.top_k)
    return ids, _weighed(scores.gather(-1, ids), spec)


def routed_experts(
    x: torch.Tensor,
    ids: torch.Tensor,
    weights: torch.Tensor,
    gate: torch.Tensor,
    up: torch.Tensor,
    down: torch.Tensor,
    spec: ExpertsSpec,
    biases: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None,
) -> torch.Tensor:
    """Weighted sum over each token's chosen experts; shapes as in `ExpertsSpec`. Negative ids add nothing.

    Args:
        biases: of gate, up and down.
    """
    out = torch.zeros_like(x)
    for e in sorted(set(ids.flatten().tolist())):
        if e < 0:
            continue
        token, choice = torch.nonzero(ids == e, as_tuple=True)
        weight = weights[token, choice][:, None]
        rows = x[token] * weight if spec.weight_on_input else x[token]
        g, u = rows @ gate[e].T, rows @ up[e].T
        if biases is not None:
            g, u = g + biases[0][e], u + biases[1][e]
        y = within(g, u, spec.activation, spec.clamped) @ down[e].T
        if biases is not None:
            y = y + biases[2][e]
        out.index_add_(0, token, y if spec.weight_on_input else y * weight)
    return out


def scored(logits: torch.Tensor, spec: RouterSpec) -> torch.Tensor:
    """Scores of logits [T, n]."""
    if spec.root_softplus:
        return torch.nn.functional.softplus(logits).sqrt()
    return logits.softmax(-1) if spec.score == "softmax" else logits.sigmoid()


def _highest(values: torch.Tensor, count: int) -> torch.Tensor:
    """Ids of the `count` highest of each row, highest first, of equals the lowest ids: topk promises none of them."""
    return values.argsort(dim=-1, descending=True, stable=True)[:, :count].contiguous()


def _weighed(weights: torch.Tensor, spec: RouterSpec) -> torch.Tensor:
    if spec.renormalise:
        weights = weights / (weights.sum(-1, keepdim=True) + spec.renorm_eps)
    return weights * spec.scale


def _keep_best_groups(choice: torch.Tensor, spec: RouterSpec) -> torch.Tensor:
    grouped = choice.view(choice.shape[0], spec.groups, -1)
    score = grouped.amax(-1) if spec.group_score == "max" else grouped.topk(2, -1).values.sum(-1)
    kept = _highest(score, spec.groups_kept)
    mask = torch.zeros_like(score, dtype=torch.bool).scatter_(1, kept, True)[..., None].expand_as(grouped)
    fill = 0.0 if spec.group_score == "max" else float("-inf")
    return grouped.masked_fill(~mask, fill).flatten(1)
