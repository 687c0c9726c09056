"""Sparse grouped-query attention: index keys of tokens and of blocks, choosing blocks, attention over the choice."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import torch

from ktcore.conformance.case import Case, Check, Context
from ktcore.conformance.data.batches import Plan, batches, scattered
from ktcore.conformance.data.memory import make_weights, values
from ktcore.conformance.levels.operator import any_format, first_page_size, normal
from ktcore.conformance.levels.specs import attention, block_indexer
from ktcore.conformance.target import Loaded
from ktcore.conformance.tolerance import compare
from ktcore.conformance.truth import attention as truth
from ktcore.conformance.truth import block_indexer as index_truth
from ktcore.conformance.truth.arithmetic import EXACT, Arithmetic
from ktcore.conformance.truth.small import rms_norm
from ktcore.ops import AttentionSpec, BlockIndexCacheSpec, BlockIndexerSpec

RAGGED = ((5, 17, 1, 0), (1, 1, 1, 33), (3, 1, 40, 1), (1, 1, 1, 1))
LONG = ((300, 20), (1, 1), (129, 1), (1, 1))
FLOATS = ("BF16", "F16", "F32")
HEADS, GROUPS, DIM, HIDDEN = 4, 2, 64, 256
MEAN = BlockIndexCacheSpec(12, 32, 4, 3, "mean")
MAX = BlockIndexCacheSpec(GROUPS, 32, 4, 3, "max", 1)
CLEAR = 0.02  # least margin of a choice, in mean scores: no rounding of float kinds turns it
SLACK = 8.0  # times what torch's own arithmetic is off: scores nearer to each other than that are equal


def cases() -> list[Case]:
    """Index keys alone, the indexer, and the branch with one; each with blocks by mean and by maximum."""
    wide_mean, wide_max = BlockIndexCacheSpec(4, 128, 4, 16, "mean"), BlockIndexCacheSpec(4, 128, 16, 4, "max", 1)
    return [
        _index("mean", "blocks by the mean of their keys", partial(_choose, MEAN, RAGGED)),
        _index("max", "blocks by their best token, a choice a head", partial(_choose, MAX, RAGGED)),
        _index("local", "two last blocks are always seen", partial(_choose, replace(MAX, local=2), RAGGED)),
        _index(
            "none-local", "a query's own block counts by its score", partial(_choose, replace(MAX, local=0), RAGGED)
        ),
        _index("mean-real-width", "4 heads of 128, long contexts", partial(_choose, wide_mean, LONG)),
        _index("max-real-width", "the same by maximum", partial(_choose, wide_max, LONG)),
        _index("all", "fewer blocks than may be chosen", partial(_choose, replace(MEAN, top=30), RAGGED)),
        _index("ties", "of equal scores the earlier block", _ties),
        _index("reused-pages", "a new sequence on pages of one that ended", _reused),
        _index("taken-back", "tokens that were guesses are replaced by others", _taken_back),
        _indexer("mean", "the norm of a block's mean, rotated as its first token", partial(_check_indexer, MEAN)),
        _indexer("max", "keys of tokens", partial(_check_indexer, MAX)),
        _attention("indexer", "attention over the blocks that its indexer chose", partial(_attend, MEAN)),
        _attention("indexer-by-head", "each key head has its own choice", partial(_attend, MAX)),
        _attention("dense-below-budget", "few tokens: the bits of attention over all", _dense),
    ]


def _index(name: str, about: str, run: Check) -> Case:
    return Case(f"L3.block_index_cache.{name}", 3, "block_index_cache", about, run)


def _indexer(name: str, about: str, run: Check) -> Case:
    return Case(f"L3.block_indexer.{name}", 3, "block_indexer", about, run)


def _attention(name: str, about: str, run: Check) -> Case:
    return Case(f"L3.attention.{name}", 3, "attention", about, run)


def _choose(spec: BlockIndexCacheSpec, steps: Sequence[Sequence[int]], ctx: Context) -> None:
    for loaded in ctx.target.load(ctx, spec, {}):
        plan = scattered(steps, first_page_size(ctx, loaded), ctx.rng("pages"))
        loaded.allocate(plan.pages, plan.page_size)
        _along(ctx, loaded, spec, plan, "all")


def _reused(ctx: Context) -> None:
    for spec in (MEAN, MAX):
        for loaded in ctx.target.load(ctx, spec, {}):
            p = first_page_size(ctx, loaded)
            first = scattered(((2 * p,), (1,)), p, ctx.rng("pages"))
            loaded.allocate(first.pages, p)
            _along(ctx, loaded, spec, first, "first")
            _along(ctx, loaded, spec, Plan(((p + 2,), (1,), (1,)), p, first.pages, (first.tables[0][:2],)), "second")


def _taken_back(ctx: Context) -> None:
    """Nine tokens were wrong guesses: others come to their places, and complete the same blocks."""
    for spec in (MEAN, MAX):
        for loaded in ctx.target.load(ctx, spec, {}):
            plan = scattered(((30,), (11,)), first_page_size(ctx, loaded), ctx.rng("pages"))
            loaded.allocate(plan.pages, plan.page_size)
            _along(ctx, loaded, spec, plan, "guessed")
            _along(ctx, loaded, spec, replace(plan, steps=((30,), (2,), (9,))), "guessed", ahead=32)


def _along(ctx: Context, loaded: Loaded, spec: BlockIndexCacheSpec, plan: Plan, what: str, ahead: int = 0) -> None:
    """Store and choose along the plan; every choice is held against the scores of all blocks.

    Args:
        ahead: tokens of the (one) sequence that are stored already.
    """
    rng, lengths = ctx.rng(f"values {what}"), plan.lengths()
    keys = [normal(rng, max(n, 64), spec.dim)[:n] for n in lengths]
    queries = [normal(rng, max(n, 64), spec.heads, spec.dim)[:n] for n in lengths]
    if ahead:
        # larger ones: their blocks are chosen whenever they may be
        keys[0][ahead:] = 4.0 * normal(ctx.rng("replaced"), len(keys[0]) - ahead, spec.dim)
    got: list[list[torch.Tensor]] = [[] for _ in lengths]
    for step, rows in batches(plan):
        if ahead and rows[0][1].stop <= ahead:
            continue
        new = [torch.cat([t[i][span] for i, span in rows]) for t in (keys, queries)]
        means = ctx.target.call(loaded.module.append, step, new[0])
        if spec.pool == "mean":
            # whatever is made of the means is what the choice goes by
            ctx.target.call(loaded.module.complete, step, means.flip(-1))
        out = ctx.target.call(loaded.module.choose, step, new[1])
        for at, (i, span) in zip(step.q_start, rows, strict=False):
            got[i].append(out[at : at + span.stop - span.start])
    for parts, q, k in zip(got, queries, keys, strict=True):
        both = (EXACT, Arithmetic.of(loaded.precision))
        _judge(ctx, loaded, spec, torch.cat(parts), ahead, *(_scores(spec, q, k, a) for a in both))


def _scores(spec: BlockIndexCacheSpec, q: torch.Tensor, k: torch.Tensor, a: Arithmetic) -> torch.Tensor:
    k = a.stored(k)
    if spec.pool == "mean":
        whole = len(k) // spec.block
        k = a.stored(k[: whole * spec.block].reshape(whole, spec.block, spec.dim).mean(1).flip(-1))
    return index_truth.block_scores(spec, a.cast(q), k)


def _judge(
    ctx: Context,
    loaded: Loaded,
    spec: BlockIndexCacheSpec,
    chosen: torch.Tensor,
    ahead: int,
    exact: torch.Tensor,
    own: torch.Tensor,
) -> None:
    """Fail unless each row of `chosen` names the right tokens of blocks none of which is clearly too low."""
    known = exact != index_truth.NEVER
    slack = SLACK * float((own.double() - exact)[known].abs().max()) + 1e-6 * float(exact[known].abs().max())
    by_head = spec.pool == "max"
    shape = [len(exact) - ahead, *([spec.heads] if by_head else []), spec.width]
    ctx.require(list(chosen.shape) == shape, f"{loaded.id}: a choice {list(chosen.shape)}, not {shape}")
    for t, of_rows in enumerate(chosen if by_head else chosen[:, None], ahead):
        for r, row in enumerate(of_rows.tolist()):
            score, must = exact[t, r], index_truth.forced(spec, t)
            choosable = [at for at in range(exact.shape[2]) if score[at] != index_truth.NEVER]
            named = [s for s in row if s >= 0]
            blocks = {s // spec.block for s in named} & set(choosable)
            what = f"{loaded.id}: token {t}, row {r} chooses {named[:24]}"
            ctx.require(row[len(named) :] == [-1] * (len(row) - len(named)), f"{what}: tokens behind a -1")
            ctx.require(named == index_truth.tokens(spec, t, blocks), f"{what}: not rising, or not whole blocks")
            count = min(len(choosable), spec.top)
            ctx.require(len(blocks) == count and must <= blocks, f"{what}: {len(blocks)} blocks, not {count}")
            ranked = sorted((float(score[at]) for at in choosable if at not in must), reverse=True)
            free = [float(score[at]) for at in blocks - must]
            short = ranked[len(free) - 1] - min(free) if free else 0.0
            ctx.require(short <= slack, f"{what}: a block is {short:.3g} below the best (slack {slack:.3g})")


def _ties(ctx: Context) -> None:
    """Blocks of two kinds in turn: all of the better kind score alike, and so do the others."""
    rng = ctx.rng("values")
    # whole numbers: no order of summation rounds
    better = torch.from_numpy(rng.integers(1, 4, 32)).float()
    keys = torch.stack([better if t // 4 % 3 else -better for t in range(72)])
    for spec in (replace(MEAN, heads=2), replace(MAX, local=0)):
        q = better.expand(72, spec.heads, 32).contiguous()
        for loaded in ctx.target.load(ctx, spec, {}):
            plan = scattered(((72,),), first_page_size(ctx, loaded), ctx.rng("pages"))
            loaded.allocate(plan.pages, plan.page_size)
            ((step, _),) = batches(plan)
            means = ctx.target.call(loaded.module.append, step, keys)
            if spec.pool == "mean":
                ctx.target.call(loaded.module.complete, step, means)
            got = ctx.target.call(loaded.module.choose, step, q)[71].reshape(-1, spec.width)
            best = [at for at in range(18) if at % 3][: spec.top]
            # by maximum, the query's own block counts without being forced
            wanted = index_truth.tokens(spec, 71, set(best) | index_truth.forced(replace(spec, local=0), 71))
            for row in got.tolist():
                ctx.require([s for s in row if s >= 0] == wanted, f"{loaded.id} chooses {row}, not {wanted}")


def _check_indexer(cache: BlockIndexCacheSpec, ctx: Context) -> None:
    def make(fmt: str) -> BlockIndexerSpec:
        return block_indexer(HIDDEN, cache, fmt)

    spec = make(any_format(ctx, make, FLOATS))
    weights = make_weights(spec, ctx.rng("weights"))
    known, rng = values(weights), ctx.rng("inputs")
    plan = scattered(RAGGED, 16, ctx.rng("pages"))
    inputs = [normal(rng, n, spec.hidden) for n in plan.lengths()]
    for loaded in ctx.target.load(ctx, spec, weights):
        plan = replace(plan, page_size=first_page_size(ctx, loaded))
        loaded.allocate(plan.pages, plan.page_size)
        got: list[list[torch.Tensor]] = [[] for _ in inputs]
        for step, rows in batches(plan):
            out = ctx.target.call(loaded.module, torch.cat([inputs[i][span] for i, span in rows]), step)
            for at, (i, span) in zip(step.q_start, rows, strict=False):
                got[i].append(out[at : at + span.stop - span.start])
        for parts, x in zip(got, inputs, strict=True):
            both = (EXACT, Arithmetic.of(loaded.precision))
            scores = (index_truth.indexer_scores(spec, known, x, a) for a in both)
            _judge(ctx, loaded, cache, torch.cat(parts), 0, *scores)


def _sparse(cache: BlockIndexCacheSpec, fmt: str) -> AttentionSpec:
    plain = attention(HEADS, GROUPS, DIM, fmt, HIDDEN)
    return replace(plain, cache=replace(plain.cache, chosen=True), indexer=block_indexer(HIDDEN, cache, fmt))


def _attend(cache: BlockIndexCacheSpec, ctx: Context) -> None:
    spec = _sparse(cache, any_format(ctx, partial(_sparse, cache), FLOATS))
    weights = make_weights(spec, ctx.rng("weights"))
    known = values(weights)
    x, scores = _clear(ctx, spec, known)
    choice = index_truth.best(cache, scores)
    choice = choice[:, 0] if cache.pool == "mean" else choice
    exact = truth.attention(spec, known, x, EXACT, choice)
    steps = ((9,), (1,), (len(x) - 11,), (1,))
    for loaded in ctx.target.load(ctx, spec, weights):
        got = _run(ctx, loaded, scattered(steps, first_page_size(ctx, loaded), ctx.rng("pages")), x)
        own = truth.attention(spec, known, x, Arithmetic.of(loaded.precision), choice)
        compare(ctx, got, exact, own, f"{loaded.id}: result")


def _clear(ctx: Context, spec: AttentionSpec, known: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens whose choices no rounding turns, with their scores."""
    indexer = spec.indexer
    assert indexer is not None
    assert spec.norm is not None
    for i in range(400):
        x = normal(ctx.rng(f"inputs {i}"), indexer.cache.width + 8, spec.hidden)
        scores = index_truth.indexer_scores(
            indexer, known, rms_norm(spec.norm, known, x, EXACT, "norm."), EXACT, "indexer."
        )
        if index_truth.margin(indexer.cache, scores) > CLEAR:
            return x, scores
    raise AssertionError("no inputs with clear choices were found")


def _dense(ctx: Context) -> None:
    """Where everything is chosen, the result is that of the same implementation's dense branch, bit by bit."""
    for cache in (MEAN, MAX):
        spec = _sparse(cache, any_format(ctx, partial(_sparse, cache)))
        plain = replace(spec, cache=replace(spec.cache, chosen=False), indexer=None)
        weights = make_weights(spec, ctx.rng("weights"))
        x = normal(ctx.rng("inputs"), cache.top * cache.block, spec.hidden)
        dense = {loaded.id: loaded for loaded in ctx.target.load(ctx, plain, weights)}
        for loaded in ctx.target.load(ctx, spec, weights):
            other = dense.get(loaded.id)
            mine = {part for part in loaded.answered_by if "index" not in part}
            if other is None or not set(other.answered_by) <= mine:
                ctx.not_applicable(f"{loaded.id}: other parts than without a choice: {', '.join(loaded.answered_by)}")
                return
            plan = scattered(((7,), (1,), (len(x) - 8,)), first_page_size(ctx, loaded), ctx.rng("pages"))
            sparse, full = _run(ctx, loaded, plan, x), _run(ctx, other, plan, x)
            ctx.require(torch.equal(sparse, full), f"{loaded.id}: with all tokens chosen it is not dense attention")


def _run(ctx: Context, loaded: Loaded, plan: Plan, x: torch.Tensor) -> torch.Tensor:
    """One sequence along the plan."""
    loaded.allocate(plan.pages, plan.page_size)
    return torch.cat([ctx.target.call(loaded.module, x[span], step) for step, ((_, span),) in batches(plan)])
