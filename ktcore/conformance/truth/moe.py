"""Truth of the mixture of experts: token by token, choice by choice."""

from __future__ import annotations

import torch

from ktcore.conformance.truth.arithmetic import Arithmetic
from ktcore.conformance.truth.small import Values, between, linear, mlp, rms_norm
from ktcore.ops import ExpertsSpec, MoESpec, RouterSpec


def router(
    spec: RouterSpec, w: Values, x: torch.Tensor, a: Arithmetic, prefix: str = ""
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x [T, hidden] -> ids [T, k], weights [T, k], and by how much each token's choice was made [T]."""
    logits = _logits(spec, w, x, a, prefix)
    own = a.cast(w[f"{prefix}expert_scale"]) if spec.expert_scale else None
    if spec.on_logits:
        ranked, order = torch.sort(logits, dim=-1, descending=True, stable=True)
        ids = order[:, : spec.top_k]
        return ids, _weigh(spec, logits, ids, own), ranked[:, spec.top_k - 1] - ranked[:, spec.top_k]
    score = _scores(spec, logits)
    choice = score + a.cast(w[f"{prefix}bias"]) if spec.choice_bias else score.clone()
    margin = torch.full((x.shape[0],), float("inf"), dtype=a.compute)
    if spec.groups > 1:
        choice, margin = _best_groups(spec, choice)
    ranked, order = torch.sort(choice, dim=-1, descending=True, stable=True)
    if spec.top_k < spec.experts:
        margin = torch.minimum(margin, ranked[:, spec.top_k - 1] - ranked[:, spec.top_k])
    ids = order[:, : spec.top_k]
    return ids, _weigh(spec, logits, ids, own), margin


def router_weights(
    spec: RouterSpec, w: Values, x: torch.Tensor, ids: torch.Tensor, a: Arithmetic, prefix: str = ""
) -> torch.Tensor:
    """Weights [T, k] of experts that are chosen already."""
    own = a.cast(w[f"{prefix}expert_scale"]) if spec.expert_scale else None
    return _weigh(spec, _logits(spec, w, x, a, prefix), ids, own)


def experts(
    spec: ExpertsSpec,
    w: Values,
    x: torch.Tensor,
    ids: torch.Tensor,
    weights: torch.Tensor,
    a: Arithmetic,
    prefix: str = "",
) -> torch.Tensor:
    """x [T, hidden], ids [T, k], weights [T, k] -> [T, hidden]."""
    x, weights = a.cast(x), a.cast(weights)
    out = torch.zeros_like(x)
    for t in range(x.shape[0]):
        for j in range(ids.shape[1]):
            e = int(ids[t, j])
            if e < 0:
                continue
            row = x[t : t + 1] * weights[t, j] if spec.weight_on_input else x[t : t + 1]
            gate, up = (_projected(spec, w, row, e, prefix + role, a) for role in ("gate", "up"))
            y = _projected(spec, w, between(gate, up, spec.activation, spec.clamped), e, f"{prefix}down", a)[0]
            out[t] += y if spec.weight_on_input else y * weights[t, j]
    return out


def _projected(spec: ExpertsSpec, w: Values, x: torch.Tensor, expert: int, role: str, a: Arithmetic) -> torch.Tensor:
    y = a.matmul(x, w[role][expert])
    return y + a.cast(w[f"{role}_bias"][expert]) if spec.bias else y


def moe(
    spec: MoESpec,
    w: Values,
    x: torch.Tensor,
    a: Arithmetic,
    before: torch.Tensor | None = None,
    named: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """x [T, hidden] -> [T, hidden], and by how much each token's experts were chosen [T].

    Args:
        before: [T, hidden], what an early router reads.
        named: int64 [T, k], experts that a table holds for the tokens.
    """
    n = rms_norm(spec.norm, w, x, a, "norm.") if spec.norm else a.cast(x)
    read = n if before is None else a.cast(before)
    read = rms_norm(spec.router_norm, w, x, a, "router_norm.") if spec.router_norm else read
    if named is None:
        ids, weights, margin = router(spec.router, w, read, a, "router.")
    else:
        ids, margin = named, torch.full((len(x),), float("inf"))
        weights = router_weights(spec.router, w, read, ids, a, "router.")
    y = experts(spec.experts, w, n, ids, weights, a, "experts.")
    y = rms_norm(spec.routed_norm, w, y, a, "routed_norm.") if spec.routed_norm else y
    if spec.shared:
        part = mlp(spec.shared, w, a.cast(x) if spec.shared_apart else n, a, "shared.")
        if spec.shared_gate:
            part = part / (1 + torch.exp(-linear(spec.shared_gate, w, n, a, "shared_gate.")))
        y = y + part
    y = rms_norm(spec.post_norm, w, y, a, "post_norm.") if spec.post_norm else y
    y = a.cast(x) + y if spec.residual else y
    return (y * a.cast(w["out_scale"]) if spec.out_scale else y), margin


def _logits(spec: RouterSpec, w: Values, x: torch.Tensor, a: Arithmetic, prefix: str) -> torch.Tensor:
    logits = a.cast(x) @ a.cast(w[f"{prefix}weight"]).T
    return logits + a.cast(w[f"{prefix}logit_bias"]) if spec.logit_bias else logits


def _scores(spec: RouterSpec, logits: torch.Tensor) -> torch.Tensor:
    if spec.root_softplus:
        # log(1 + e^t) without overflow
        return torch.sqrt(torch.logaddexp(logits, torch.zeros((), dtype=logits.dtype)))
    return torch.softmax(logits, -1) if spec.score == "softmax" else 1 / (1 + torch.exp(-logits))


def _weigh(spec: RouterSpec, logits: torch.Tensor, ids: torch.Tensor, own: torch.Tensor | None) -> torch.Tensor:
    """By scores of the chosen, which with `on_logits` are computed of these alone; `own` [E]: experts' factors."""
    chosen = logits.gather(-1, ids)
    weights = _scores(spec, chosen) if spec.on_logits else _scores(spec, logits).gather(-1, ids)
    if spec.renormalise:
        weights = weights / (weights.sum(-1, keepdim=True) + spec.renorm_eps)
    return weights * spec.scale if own is None else weights * spec.scale * own[ids]


def _best_groups(spec: RouterSpec, choice: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Choices outside of the kept groups masked, and the margin between the last kept group and the next."""
    groups = choice.reshape(choice.shape[0], spec.groups, -1)
    best = groups.sort(-1, descending=True).values
    score = best[..., 0] if spec.group_score == "max" else best[..., 0] + best[..., 1]
    ranked, order = torch.sort(score, dim=-1, descending=True, stable=True)
    keep = torch.zeros_like(score, dtype=torch.bool).scatter_(-1, order[:, : spec.groups_kept], True)
    fill = 0.0 if spec.group_score == "max" else float("-inf")
    margin = (
        ranked[:, spec.groups_kept - 1] - ranked[:, spec.groups_kept]
        if spec.groups_kept < spec.groups
        else torch.full_like(ranked[:, 0], float("inf"))
    )
    return torch.where(keep[..., None], groups, fill).flatten(1), margin
