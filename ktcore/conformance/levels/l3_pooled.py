"""Pooled index keys: pools that steps and pages cut, the choice of whole pools, and latent attention over it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import torch

from ktcore.conformance.case import Case, Check, Context
from ktcore.conformance.data.batches import Plan, batches, scattered
from ktcore.conformance.data.memory import make_weights, values
from ktcore.conformance.levels.l3_sparse import DIM, FLOATS, HEADS, LONG, RAGGED, SLACK, run_sparse
from ktcore.conformance.levels.operator import any_format, first_page_size, normal
from ktcore.conformance.levels.specs import mla, token_indexer, without_positions
from ktcore.conformance.target import Loaded
from ktcore.conformance.tolerance import compare
from ktcore.conformance.truth import attention as truth
from ktcore.conformance.truth import indexer as index_truth
from ktcore.conformance.truth.arithmetic import EXACT, Arithmetic
from ktcore.conformance.truth.small import rms_norm
from ktcore.ops import IndexCacheSpec, MLASpec, TokenIndexerSpec

POOL, TOP_K = 4, 12
SPEC = IndexCacheSpec(HEADS, DIM, TOP_K, POOL)
CLEAR = 0.02  # least margin of a choice, in mean scores: no rounding of float kinds turns it


def cases() -> list[Case]:
    """Keys and gates alone, the indexer, and the branch with one."""
    wide = IndexCacheSpec(32, 128, 64, POOL)
    return [
        _index("pooled", "four sequences of different age", partial(_choose, SPEC, RAGGED)),
        _index("pooled-real-width", "32 heads of 128, long contexts", partial(_choose, wide, LONG)),
        _index("pooled-by-16", "pools as wide as a page", partial(_choose, replace(SPEC, top_k=32, pool=16), LONG)),
        _index("pooled-all", "fewer pools than may be chosen", partial(_choose, replace(SPEC, top_k=80), RAGGED)),
        _index("pooled-taken-back", "tokens that were guesses are replaced by others", _taken_back),
        Case("L3.token_indexer.pooled", 3, "token_indexer", "gates of their own, by place in the pool", _indexer),
        Case("L3.mla.pooled-indexer", 3, "mla", "attention over the pools that its own indexer chose", _branch),
    ]


def _index(name: str, about: str, run: Check) -> Case:
    return Case(f"L3.index_cache.{name}", 3, "index_cache", about, run)


def _choose(spec: IndexCacheSpec, steps: Sequence[Sequence[int]], ctx: Context) -> None:
    for loaded in ctx.target.load(ctx, spec, {}):
        plan = scattered(steps, first_page_size(ctx, loaded), ctx.rng("pages"))
        loaded.allocate(plan.pages, plan.page_size)
        _along(ctx, loaded, spec, plan)


def _taken_back(ctx: Context) -> None:
    """Nine tokens were wrong guesses: others come to their places, and complete the same pools."""
    for loaded in ctx.target.load(ctx, SPEC, {}):
        plan = scattered(((30,), (11,)), first_page_size(ctx, loaded), ctx.rng("pages"))
        loaded.allocate(plan.pages, plan.page_size)
        _along(ctx, loaded, SPEC, plan)
        _along(ctx, loaded, SPEC, replace(plan, steps=((30,), (2,), (9,))), ahead=32)


def _along(ctx: Context, loaded: Loaded, spec: IndexCacheSpec, plan: Plan, ahead: int = 0) -> None:
    """Store and choose along the plan; every choice is held against the scores of all pools.

    Args:
        ahead: tokens of the (one) sequence that are stored already.
    """
    rng, lengths = ctx.rng("values"), plan.lengths()
    keys, gates = ([normal(rng, max(n, 64), spec.dim)[:n] for n in lengths] for _ in range(2))
    queries = [normal(rng, max(n, 64), spec.heads, spec.dim)[:n] for n in lengths]
    weights = [normal(rng, max(n, 64), spec.heads)[:n] for n in lengths]
    if ahead:
        keys[0][ahead:] = 4.0 * normal(ctx.rng("replaced"), len(keys[0]) - ahead, spec.dim)
    got: list[list[torch.Tensor]] = [[] for _ in lengths]
    for step, rows in batches(plan):
        if rows[0][1].stop <= ahead:
            continue
        new = [torch.cat([t[i][span] for i, span in rows]) for t in (keys, gates, queries, weights)]
        ctx.target.call(loaded.module.append, step, new[0], new[1])
        out = ctx.target.call(loaded.module.choose, step, new[2], new[3])
        for at, (i, span) in zip(step.q_start, rows, strict=False):
            got[i].append(out[at : at + span.stop - span.start])
    for chosen, q, w, k, g in zip(got, queries, weights, keys, gates, strict=True):
        both = []
        for a in (EXACT, Arithmetic.of(loaded.precision)):
            pools = index_truth.pooled(a.stored(k), a.stored(g), spec.pool)
            both.append(index_truth.scores(a.cast(q), a.cast(w), pools))
        _judge(ctx, loaded, spec, torch.cat(chosen), both[0], both[1], ahead)


def _judge(
    ctx: Context,
    loaded: Loaded,
    spec: IndexCacheSpec,
    chosen: torch.Tensor,
    exact: torch.Tensor,
    own: torch.Tensor,
    first: int = 0,
) -> None:
    """Fail unless each row names whole pools, none that is clearly too low, and the tokens behind the last one."""
    difference = (own.double() - exact).abs()
    slack = SLACK * float(difference.max()) + 1e-6 * float(exact.abs().max()) if exact.numel() else 0.0
    for t, row in enumerate(chosen.tolist(), first):
        seen, tail = index_truth.pools_seen(exact, t, spec.pool, spec.top_k // spec.pool)
        count = len(seen) * spec.pool + len(tail)
        named = row[:count]
        what = f"{loaded.id}: token {t} chooses {named[:20]}"
        ctx.require(row[count:] == [-1] * (spec.width - count), f"{what}: behind {count} tokens there is no -1")
        ctx.require(named == sorted(set(named)), f"{what}: not rising, or twice the same")
        ctx.require(named[count - len(tail) :] == tail, f"{what}: without the tokens behind the last pool, {tail}")
        pools = [named[i] // spec.pool for i in range(0, len(seen) * spec.pool, spec.pool)]
        whole = [p * spec.pool + i for p in pools for i in range(spec.pool)]
        ctx.require(named[: len(whole)] == whole, f"{what}: not whole pools")
        if seen:
            short = float(exact[t, seen].min() - exact[t, pools].min())
            ctx.require(short <= slack, f"{what}: a pool is {short:.3g} below the last of the best (slack {slack:.3g})")


def _branch_spec(fmt: str) -> MLASpec:
    plain = without_positions(mla(4, fmt, latent=256))
    indexer = token_indexer(HEADS, DIM, TOP_K, plain, fmt, pool=POOL)
    return replace(plain, cache=replace(plain.cache, chosen=True), indexer=indexer)


def _indexer(ctx: Context) -> None:
    def make(fmt: str) -> TokenIndexerSpec:
        indexer = _branch_spec(fmt).indexer
        assert indexer is not None
        return indexer

    spec = make(any_format(ctx, make, FLOATS))
    weights = make_weights(spec, ctx.rng("weights"))
    known, rng = values(weights), ctx.rng("inputs")
    plan = scattered(RAGGED, 16, ctx.rng("pages"))
    inputs, lows = ([normal(rng, n, width) for n in plan.lengths()] for width in (spec.hidden, spec.rank))
    for loaded in ctx.target.load(ctx, spec, weights):
        plan = replace(plan, page_size=first_page_size(ctx, loaded))
        loaded.allocate(plan.pages, plan.page_size)
        got: list[list[torch.Tensor]] = [[] for _ in inputs]
        for step, rows in batches(plan):
            n, low = (torch.cat([t[i][span] for i, span in rows]) for t in (inputs, lows))
            out = ctx.target.call(loaded.module, n, low, step)
            for at, (i, span) in zip(step.q_start, rows, strict=False):
                got[i].append(out[at : at + span.stop - span.start])
        for chosen, x, low in zip(got, inputs, lows, strict=True):
            both = (EXACT, Arithmetic.of(loaded.precision))
            found = [index_truth.indexer_scores(spec, known, x, low, a) for a in both]
            _judge(ctx, loaded, spec.cache, torch.cat(chosen), found[0], found[1])


def _branch(ctx: Context) -> None:
    spec = _branch_spec(any_format(ctx, _branch_spec, FLOATS))
    weights = make_weights(spec, ctx.rng("weights"))
    known = values(weights)
    x = _clear(ctx, spec, known)
    scored = _scores(spec, known, x)
    seen = torch.zeros(len(x), len(x), dtype=torch.bool)
    for t in range(len(x)):
        pools, tail = index_truth.pools_seen(scored, t, POOL, TOP_K // POOL)
        seen[t, [p * POOL + i for p in pools for i in range(POOL)] + tail] = True
    exact = truth.mla(spec, known, x, EXACT, seen)
    steps = ((9,), (1,), (len(x) - 11,), (1,))
    for loaded in ctx.target.load(ctx, spec, weights):
        got = run_sparse(ctx, loaded, scattered(steps, first_page_size(ctx, loaded), ctx.rng("pages")), x, None)
        own = truth.mla(spec, known, x, Arithmetic.of(loaded.precision), seen)
        compare(ctx, got, exact, own, f"{loaded.id}: result")


def _scores(spec: MLASpec, known: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    assert spec.indexer is not None
    assert spec.norm is not None
    n = rms_norm(spec.norm, known, x, EXACT, "norm.")
    low = truth.low_query(spec, known, n, EXACT)
    return index_truth.indexer_scores(spec.indexer, known, n, low, EXACT, "indexer.")


def _clear(ctx: Context, spec: MLASpec, known: dict[str, torch.Tensor]) -> torch.Tensor:
    """Tokens whose choices no rounding turns: as many as fill five pools, and some behind."""
    top = TOP_K // POOL
    for i in range(400):
        x = normal(ctx.rng(f"inputs {i}"), 5 * POOL + 3, spec.hidden)
        scored = _scores(spec, known, x)
        ranked = [scored[t, : (t + 1) // POOL].sort(descending=True).values for t in range(len(x))]
        gaps = [float(r[top - 1] - r[top]) for r in ranked if len(r) > top]
        if min(gaps) > CLEAR * float(scored.abs().mean()):
            return x
    raise AssertionError("no inputs with clear choices were found")
