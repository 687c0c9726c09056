"""DeepSeek-V4's routers: scores that are roots of softplus, and experts that a table holds for each token id."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import numpy as np
import torch

from ktcore.conformance.case import Case, Context
from ktcore.conformance.data.batches import batches, scattered
from ktcore.conformance.data.memory import MemoryCheckpoint, make_weights, values
from ktcore.conformance.levels.l2_router import check_router
from ktcore.conformance.levels.operator import any_format, normal
from ktcore.conformance.levels.specs import moe
from ktcore.conformance.tolerance import compare
from ktcore.conformance.truth import moe as truth
from ktcore.conformance.truth.arithmetic import EXACT, Arithmetic
from ktcore.ops import MoESpec, RouterSpec, StepBatch
from ktcore.weights.ref import Weight

TOKENS, VOCAB, HIDDEN = 33, 50, 256
ROOTS = RouterSpec(64, 16, 4, "F32", renormalise=True, renorm_eps=1e-20, scale=1.5, root_softplus=True)


def cases() -> list[Case]:
    """Routers alone, then a branch."""
    biased = partial(check_router, replace(ROOTS, choice_bias=True), TOKENS)
    return [
        Case("L3.router.root-softplus", 3, "router", "roots of softplus, and a bias of the choice", biased),
        Case("L3.router.by-token", 3, "router", "experts from a table of token ids", _by_token),
        Case("L3.moe.by-token", 3, "moe", "a branch that is told of the step", _branch),
    ]


def _by_token(ctx: Context) -> None:
    spec = replace(ROOTS, by_token=VOCAB)
    weights, step = make_weights(spec, ctx.rng("weights")), _step(ctx)
    table = _table(ctx, spec)
    known, x, named = values(weights), normal(ctx.rng("x"), TOKENS, spec.hidden), table[step.token_ids]
    exact = truth.router_weights(spec, known, x, named, EXACT)
    for loaded in ctx.target.load(ctx, spec, {**weights, "table": _stored(table)}):
        ids, got = ctx.target.call(loaded.module, x, step)
        ctx.require(torch.equal(ids, named), f"{loaded.id}: other experts than the table's, or in another order")
        own = truth.router_weights(spec, known, x, named, Arithmetic.of(loaded.precision))
        compare(ctx, got, exact, own, f"{loaded.id}: weights")


def _branch(ctx: Context) -> None:
    def make(fmt: str) -> MoESpec:
        plain = moe(HIDDEN, 8, 2, HIDDEN, fmt)
        return replace(plain, router=replace(plain.router, choice_bias=False, by_token=VOCAB, root_softplus=True))

    spec = make(any_format(ctx, make))
    weights, step = make_weights(spec, ctx.rng("weights")), _step(ctx)
    table = _table(ctx, spec.router)
    known, x, named = values(weights), normal(ctx.rng("x"), TOKENS, HIDDEN), table[step.token_ids]
    exact, _ = truth.moe(spec, known, x, EXACT, named=named)
    for loaded in ctx.target.load(ctx, spec, {**weights, "router.table": _stored(table)}):
        got = ctx.target.call(loaded.module, x, step)
        own, _ = truth.moe(spec, known, x, Arithmetic.of(loaded.precision), named=named)
        compare(ctx, got, exact, own, f"{loaded.id}: result")


def _table(ctx: Context, spec: RouterSpec) -> torch.Tensor:
    """Different experts for every token id, int64 [VOCAB, top_k]."""
    rng = ctx.rng("table")
    rows = np.stack([rng.permutation(spec.experts)[: spec.top_k] for _ in range(VOCAB)])
    return torch.from_numpy(rows.astype(np.int64))


def _stored(table: torch.Tensor) -> Weight:
    return MemoryCheckpoint().add("table", tuple(table.shape), "I64", table.numpy().view(np.uint8).reshape(-1))


def _step(ctx: Context) -> StepBatch:
    ids = torch.from_numpy(ctx.rng("ids").integers(0, VOCAB, TOKENS))
    return replace(batches(scattered(((TOKENS,),), 16, ctx.rng("pages")))[0][0], token_ids=ids)
