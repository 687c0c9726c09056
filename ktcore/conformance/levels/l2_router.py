"""Routers of every family: which experts, with which weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial

import numpy as np
import torch

from ktcore.conformance.case import Case, Check, Context
from ktcore.conformance.data.memory import MemoryCheckpoint, make_weights, values
from ktcore.conformance.levels.operator import normal
from ktcore.conformance.levels.specs import router_v3
from ktcore.conformance.tolerance import compare
from ktcore.conformance.truth import moe as truth
from ktcore.conformance.truth.arithmetic import EXACT, Arithmetic
from ktcore.ops import RouterSpec
from ktcore.weights.ref import Weight

CLEAR = 1e-4
"""A choice by less than this may go either way."""
HIDDEN = 64
KINDS = {
    "softmax-128": RouterSpec(HIDDEN, 128, 8, "F32", renormalise=True),
    "softmax-plain": RouterSpec(HIDDEN, 64, 6, "F32", scale=1.0),
    "softmax-groups": RouterSpec(HIDDEN, 160, 6, "F32", groups=8, groups_kept=3, scale=16.0),
    "sigmoid-bias-256": RouterSpec(
        HIDDEN, 256, 8, "F32", "sigmoid", True, renormalise=True, renorm_eps=1e-20, scale=2.5
    ),
    "sigmoid-groups-256": router_v3(HIDDEN),
    "sigmoid-384": RouterSpec(HIDDEN, 384, 8, "F32", "sigmoid", True, renormalise=True, renorm_eps=1e-20, scale=2.827),
    "top-1": RouterSpec(HIDDEN, 16, 1, "F32", "sigmoid"),
    "all-experts": RouterSpec(HIDDEN, 8, 8, "F32", renormalise=True),
}

_BIASED = replace(KINDS["sigmoid-bias-256"], experts=60)
_GROUPED = replace(KINDS["sigmoid-groups-256"], experts=64)
_MASKED: Mapping[str, tuple[RouterSpec, Sequence[int]]] = {
    "experts": (_BIASED, (3, 17, 58)),
    "groups": (_GROUPED, (9, 10, 41)),
    "in-groups": (_GROUPED, (9, 10, 11, 12, 13, 14, 15, 41, 42)),
    "groups-at-zero": (replace(_GROUPED, group_score="max"), (9, 63)),
    "few-kept": (replace(_GROUPED, groups_kept=1, top_k=10), range(64)),
}
"""Routers whose experts are at -inf but for some; "few-kept": the groups that are kept hold fewer than are chosen."""


def cases() -> list[Case]:
    """A case a family, and formats of the weight."""
    found = [_case(name, "choice and weights", partial(check_router, spec, 33)) for name, spec in KINDS.items()]
    found += [
        _case(
            f"{fmt}.weight", "weight stored in this format", partial(check_router, router_v3(HIDDEN, fmt=fmt), 9), fmt
        )
        for fmt in ("F32", "F16", "BF16")
    ]
    found.append(_case("one-token", "a single token", partial(check_router, router_v3(HIDDEN), 1)))
    found.append(
        _case(
            "bias-chooses-only",
            "a bias moves the choice, never the weights",
            partial(check_router, router_v3(HIDDEN), 16, bias_scale=2.0),
        )
    )
    found.append(_case("ties", "of equal groups and experts the lowest ids are chosen", _ties))
    found += [
        _case(
            f"nothing-left.{name}",
            "where only -inf is left to choose, experts not chosen yet, the lowest ids first",
            partial(check_nothing_left, spec, alive),
        )
        for name, (spec, alive) in _MASKED.items()
    ]
    return found


def _case(name: str, about: str, run: Check, fmt: str | None = None) -> Case:
    return Case(f"L2.router.{name}", 2, "router", about, run, fmt)


def check_router(spec: RouterSpec, tokens: int, ctx: Context, bias_scale: float = 0.0) -> None:
    """Compare the choice where it is clear, and all weights."""
    weights = make_weights(spec, ctx.rng("weights"))
    if bias_scale:
        bias = (bias_scale * ctx.rng("bias").standard_normal(spec.experts)).astype(np.float32)
        weights["bias"] = MemoryCheckpoint().add("bias", (spec.experts,), "F32", bias.view(np.uint8))
    known, x = values(weights), normal(ctx.rng("x"), tokens, spec.hidden)
    ids, amounts, margin = truth.router(spec, known, x, EXACT)
    clear = margin > CLEAR
    ctx.require(int(clear.sum()) * 2 >= tokens, "the case is badly made: most choices are ties")
    for loaded in ctx.target.load(ctx, spec, weights):
        got_ids, got_amounts = ctx.target.call(loaded.module, x)
        ctx.require(got_ids.dtype == torch.int64, f"{loaded.id}: ids are {got_ids.dtype}, not int64")
        ctx.require(
            got_ids.shape == ids.shape, f"{loaded.id}: ids have shape {list(got_ids.shape)}, not {list(ids.shape)}"
        )
        inside = bool(((got_ids >= 0) & (got_ids < spec.experts)).all())
        ctx.require(inside, f"{loaded.id}: an id is outside of the {spec.experts} experts")
        _compare_choice(ctx, loaded.id, ids[clear], got_ids[clear])
        own = truth.router_weights(spec, known, x, ids, Arithmetic.of(loaded.precision))
        got, exact, torch_own = (
            _dense(i, v, spec)[clear] for i, v in ((got_ids, got_amounts), (ids, amounts), (ids, own))
        )
        compare(ctx, got, exact, torch_own, f"{loaded.id}: weights")


def _ties(ctx: Context) -> None:
    """Experts equal in all of their weights; then whole groups that are, one like another."""
    for spec, apart in (
        (KINDS["softmax-plain"], 16),
        (KINDS["sigmoid-bias-256"], 64),
        (KINDS["softmax-groups"], 20),
        (KINDS["sigmoid-groups-256"], 32),
    ):
        weights = make_weights(spec, ctx.rng("weights"))
        weights = {role: _repeated(role, weight.tensor(), apart) for role, weight in weights.items()}
        known, x = values(weights), normal(ctx.rng("x"), 33, spec.hidden)
        # truth sorts stably: the first of equals comes first
        ids, _, _ = truth.router(spec, known, x, EXACT)
        for loaded in ctx.target.load(ctx, spec, weights):
            got, _ = ctx.target.call(loaded.module, x)
            _compare_choice(ctx, loaded.id, ids, got)


def check_nothing_left(spec: RouterSpec, alive: Sequence[int], ctx: Context) -> None:
    """Biases of -inf, as pruned experts have them, of all but those `alive`: fewer than are to be chosen."""
    weights = make_weights(spec, ctx.rng("weights"))
    for role in ("bias", "logit_bias"):
        if role in weights:
            kept = torch.full((spec.experts,), -float("inf"))
            kept[list(alive)] = weights[role].tensor()[list(alive)]
            weights[role] = MemoryCheckpoint().add(role, (spec.experts,), "F32", kept.numpy().view(np.uint8))
    known, x = values(weights), normal(ctx.rng("x"), 33, spec.hidden)
    ids, amounts, _ = truth.router(spec, known, x, EXACT)
    for loaded in ctx.target.load(ctx, spec, weights):
        got, got_amounts = ctx.target.call(loaded.module, x)
        _compare_choice(ctx, loaded.id, ids, got)
        own = truth.router_weights(spec, known, x, ids, Arithmetic.of(loaded.precision))
        dense = [_dense(i, v, spec) for i, v in ((got, got_amounts), (ids, amounts), (ids, own))]
        compare(ctx, dense[0], dense[1], dense[2], f"{loaded.id}: weights")


def _repeated(role: str, stored: torch.Tensor, apart: int) -> Weight:
    """A weight whose first `apart` rows come again and again, in float32."""
    rows = stored[:apart].repeat(-(-len(stored) // apart), *[1] * (stored.dim() - 1))[: len(stored)]
    return MemoryCheckpoint().add(role, tuple(rows.shape), "F32", rows.contiguous().numpy().view(np.uint8).reshape(-1))


def _compare_choice(ctx: Context, name: str, ids: torch.Tensor, got: torch.Tensor) -> None:
    wrong = (ids.sort(-1).values != got.sort(-1).values).any(-1)
    if bool(wrong.any()):
        row = int(wrong.nonzero()[0])
        ctx.fail(f"{name}: token {row} got experts {sorted(got[row].tolist())}, not {sorted(ids[row].tolist())}")


def _dense(ids: torch.Tensor, amounts: torch.Tensor, spec: RouterSpec) -> torch.Tensor:
    """Weights by expert [T, experts]: the order among a token's experts does not matter."""
    return torch.zeros(ids.shape[0], spec.experts, dtype=amounts.dtype).scatter_(1, ids, amounts)
