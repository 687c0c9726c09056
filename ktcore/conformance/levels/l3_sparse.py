"""Sparse attention: index keys in scattered pages, the choice of tokens, and latent attention over what was chosen."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import torch

from ktcore.conformance.case import Case, Check, Context
from ktcore.conformance.data.batches import Plan, batches, scattered
from ktcore.conformance.data.memory import make_weights, values
from ktcore.conformance.levels.l2_kv_cache import among, drawn_choices
from ktcore.conformance.levels.operator import any_format, first_page_size, normal
from ktcore.conformance.levels.specs import mla, token_indexer
from ktcore.conformance.target import Loaded
from ktcore.conformance.tolerance import compare
from ktcore.conformance.truth import attention as truth
from ktcore.conformance.truth import indexer as index_truth
from ktcore.conformance.truth.arithmetic import EXACT, Arithmetic
from ktcore.conformance.truth.small import rms_norm
from ktcore.ops import IndexCacheSpec, MLASpec, TokenIndexerSpec

RAGGED = ((5, 17, 1, 0), (1, 1, 1, 33), (3, 1, 40, 1), (1, 1, 1, 1))
LONG = ((300, 20), (1, 1), (129, 1), (1, 1))
FLOATS = ("BF16", "F16", "F32")
HEADS, DIM, TOP_K = 16, 64, 12
CLEAR = 0.02  # least margin of a choice, in mean scores: no rounding of float kinds turns it
SLACK = 8.0  # times what torch's own arithmetic is off: scores nearer to each other than that are equal


def cases() -> list[Case]:
    """Index keys alone, the indexer, the branch with one, and the branch with another layer's choice."""
    small, wide = IndexCacheSpec(HEADS, DIM, TOP_K), IndexCacheSpec(32, 128, 64)
    return [
        _index("ragged", "four sequences of different age", partial(_choose, small, RAGGED)),
        _index("real-width", "32 heads of 128, long contexts", partial(_choose, wide, LONG)),
        _index("all", "fewer tokens than may be chosen", partial(_choose, replace(small, top_k=80), RAGGED)),
        _index("ties", "of equal scores the earlier token", _ties),
        _index("reused-pages", "a new sequence on pages of one that ended", _reused),
        _indexer("ragged", "projections, LayerNorm, rotation and choice", partial(_check_indexer, 1e-6)),
        _indexer("eps", "an epsilon as large as keys", partial(_check_indexer, 0.5)),
        _mla("indexer", "attention over the tokens that its own indexer chose", _own_index),
        _mla("shared-index", "attention over the tokens that were handed on", _shared_index),
        _mla("dense-below-top-k", "few tokens: the bits of attention over all", _dense),
    ]


def _index(name: str, about: str, run: Check) -> Case:
    return Case(f"L3.index_cache.{name}", 3, "index_cache", about, run)


def _indexer(name: str, about: str, run: Check) -> Case:
    return Case(f"L3.token_indexer.{name}", 3, "token_indexer", about, run)


def _mla(name: str, about: str, run: Check) -> Case:
    return Case(f"L3.mla.{name}", 3, "mla", about, run)


def _choose(spec: IndexCacheSpec, steps: Sequence[Sequence[int]], ctx: Context) -> None:
    for loaded in ctx.target.load(ctx, spec, {}):
        plan = scattered(steps, first_page_size(ctx, loaded), ctx.rng("pages"))
        loaded.allocate(plan.pages, plan.page_size)
        _along(ctx, loaded, spec, plan, "all")


def _reused(ctx: Context) -> None:
    spec = IndexCacheSpec(HEADS, DIM, TOP_K)
    for loaded in ctx.target.load(ctx, spec, {}):
        p = first_page_size(ctx, loaded)
        first = scattered(((2 * p,), (1,)), p, ctx.rng("pages"))
        loaded.allocate(first.pages, p)
        _along(ctx, loaded, spec, first, "first")
        _along(ctx, loaded, spec, Plan(((p + 2,), (1,), (1,)), p, first.pages, (first.tables[0][:2],)), "second")


def _along(ctx: Context, loaded: Loaded, spec: IndexCacheSpec, plan: Plan, what: str) -> None:
    """Store and choose along the plan; every choice is held against the scores of all tokens."""
    rng, lengths = ctx.rng(f"values {what}"), plan.lengths()
    keys = [normal(rng, n, spec.dim) for n in lengths]
    queries = [normal(rng, n, spec.heads, spec.dim) for n in lengths]
    weights = [normal(rng, n, spec.heads) for n in lengths]
    got = [torch.empty(0, spec.top_k, dtype=torch.int32) for _ in lengths]
    for step, rows in batches(plan):
        new = [torch.cat([t[i][span] for i, span in rows]) for t in (keys, queries, weights)]
        ctx.target.call(loaded.module.append, step, new[0])
        out = ctx.target.call(loaded.module.choose, step, new[1], new[2])
        for at, (i, span) in zip(step.q_start, rows, strict=False):
            got[i] = torch.cat((got[i], out[at : at + span.stop - span.start]))
    for chosen, q, w, k in zip(got, queries, weights, keys, strict=True):
        exact, own = (_scores(q, w, k, a) for a in (EXACT, Arithmetic.of(loaded.precision)))
        judge(ctx, loaded, chosen, exact, own)


def _scores(q: torch.Tensor, w: torch.Tensor, k: torch.Tensor, a: Arithmetic) -> torch.Tensor:
    return index_truth.scores(a.cast(q), a.cast(w), a.stored(k))


def judge(
    ctx: Context, loaded: Loaded, chosen: torch.Tensor, exact: torch.Tensor, own: torch.Tensor, ratio: int = 1
) -> None:
    """Fail unless each row of `chosen` names the right number of tokens, rising, and none that is clearly too low.

    Args:
        ratio: tokens that stand behind each of the things to choose from.
    """
    top_k = chosen.shape[1]
    slack = SLACK * float((own.double() - exact).abs().max()) + 1e-6 * float(exact.abs().max())
    for t, row in enumerate(chosen.tolist()):
        there = (t + 1) // ratio
        count = min(there, top_k)
        named = row[:count]
        what = f"{loaded.id}: token {t} chooses {named[:20]}"
        ctx.require(row[count:] == [-1] * (top_k - count), f"{what}: behind {count} there is no -1")
        ctx.require(named == sorted(set(named)), f"{what}: not rising, or twice the same")
        ctx.require(all(0 <= s < there for s in named), f"{what}: one that is later, or none")
        if not count:
            continue
        least = float(exact[t, :there].sort(descending=True).values[count - 1])
        short = least - float(exact[t, named].min())
        ctx.require(short <= slack, f"{what}: one is {short:.3g} below the last of the best (slack {slack:.3g})")


def _ties(ctx: Context) -> None:
    """Keys of two kinds in turn: all of the better kind score alike, and so do the others."""
    spec = IndexCacheSpec(HEADS, DIM, TOP_K)
    rng = ctx.rng("values")
    # whole numbers: no order of summation rounds
    better = torch.from_numpy(rng.integers(1, 4, DIM)).float()
    keys = torch.stack([better if t % 3 else -better for t in range(70)])
    q, w = better.expand(70, HEADS, DIM).contiguous(), torch.ones(70, HEADS)
    for loaded in ctx.target.load(ctx, spec, {}):
        plan = scattered(((70,),), first_page_size(ctx, loaded), ctx.rng("pages"))
        loaded.allocate(plan.pages, plan.page_size)
        ((step, _),) = batches(plan)
        ctx.target.call(loaded.module.append, step, keys)
        got = ctx.target.call(loaded.module.choose, step, q, w)
        wanted = sorted([t for t in range(70) if t % 3][:TOP_K])
        ctx.require(got[69].tolist() == wanted, f"{loaded.id} chooses {got[69].tolist()}, not {wanted}")


def _check_indexer(eps: float, ctx: Context) -> None:
    def make(fmt: str) -> TokenIndexerSpec:
        return token_indexer(HEADS, DIM, TOP_K, mla(4, fmt, latent=256), fmt, eps)

    spec = make(any_format(ctx, make, FLOATS))
    weights = make_weights(spec, ctx.rng("weights"))
    known, rng = values(weights), ctx.rng("inputs")
    plan = scattered(RAGGED, 16, ctx.rng("pages"))
    # tokens of all sizes, where keys are compared with epsilon
    sizes = [0.3 ** (torch.arange(n) % 4)[:, None] if eps > 1e-3 else torch.ones(n, 1) for n in plan.lengths()]
    inputs = [s * normal(rng, n, spec.hidden) for s, n in zip(sizes, plan.lengths(), strict=True)]
    lows = [normal(rng, n, spec.rank) for n in plan.lengths()]
    for loaded in ctx.target.load(ctx, spec, weights):
        plan = replace(plan, page_size=first_page_size(ctx, loaded))
        loaded.allocate(plan.pages, plan.page_size)
        got = [torch.empty(0, TOP_K, dtype=torch.int32) for _ in inputs]
        for step, rows in batches(plan):
            n, low = (torch.cat([t[i][span] for i, span in rows]) for t in (inputs, lows))
            out = ctx.target.call(loaded.module, n, low, step)
            for at, (i, span) in zip(step.q_start, rows, strict=False):
                got[i] = torch.cat((got[i], out[at : at + span.stop - span.start]))
        for chosen, x, low in zip(got, inputs, lows, strict=True):
            both = (EXACT, Arithmetic.of(loaded.precision))
            exact, own = (index_truth.indexer_scores(spec, known, x, low, a) for a in both)
            judge(ctx, loaded, chosen, exact, own)


def _sparse(fmt: str, indexed: bool) -> MLASpec:
    plain = mla(4, fmt, latent=256)
    indexer = token_indexer(HEADS, DIM, TOP_K, plain, fmt) if indexed else None
    return replace(plain, cache=replace(plain.cache, chosen=True), indexer=indexer, shared_index=not indexed)


def _own_index(ctx: Context) -> None:
    spec = _sparse(any_format(ctx, partial(_sparse, indexed=True), FLOATS), indexed=True)
    assert spec.indexer is not None
    weights = make_weights(spec, ctx.rng("weights"))
    known = values(weights)
    x = _clear(ctx, spec, known)
    choice = index_truth.best(_branch_scores(spec, known, x), TOP_K)
    exact = truth.mla(spec, known, x, EXACT, choice)
    steps = ((9,), (1,), (len(x) - 11,), (1,))
    for loaded in ctx.target.load(ctx, spec, weights):
        got = run_sparse(ctx, loaded, scattered(steps, first_page_size(ctx, loaded), ctx.rng("pages")), x, None)
        own = truth.mla(spec, known, x, Arithmetic.of(loaded.precision), choice)
        compare(ctx, got, exact, own, f"{loaded.id}: result")


def _clear(ctx: Context, spec: MLASpec, known: dict[str, torch.Tensor]) -> torch.Tensor:
    """Tokens whose choices no rounding turns, and which do not all choose the same."""
    for i in range(400):
        x = normal(ctx.rng(f"inputs {i}"), TOP_K + 6, spec.hidden)
        if index_truth.margin(_branch_scores(spec, known, x), TOP_K) > CLEAR:
            return x
    raise AssertionError("no inputs with clear choices were found")


def _branch_scores(spec: MLASpec, known: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    assert spec.indexer is not None
    n = rms_norm(spec.norm, known, x, EXACT, "norm.") if spec.norm else EXACT.cast(x)
    low = truth.low_query(spec, known, n, EXACT)
    return index_truth.indexer_scores(spec.indexer, known, n, low, EXACT, "indexer.")


def _shared_index(ctx: Context) -> None:
    spec = _sparse(any_format(ctx, partial(_sparse, indexed=False)), indexed=False)
    weights = make_weights(spec, ctx.rng("weights"))
    known = values(weights)
    x = normal(ctx.rng("inputs"), 180, spec.hidden)
    choice = drawn_choices(ctx.rng("choices"), len(x))
    seen = among(choice, len(x))
    exact = truth.mla(spec, known, x, EXACT, seen)
    for loaded in ctx.target.load(ctx, spec, weights):
        plan = scattered(((40,), (1,), (138,), (1,)), first_page_size(ctx, loaded), ctx.rng("pages"))
        got = run_sparse(ctx, loaded, plan, x, choice)
        own = truth.mla(spec, known, x, Arithmetic.of(loaded.precision), seen)
        compare(ctx, got, exact, own, f"{loaded.id}: result")


def _dense(ctx: Context) -> None:
    """Where everything is chosen, the result is that of the same implementation's dense branch, bit by bit."""
    spec = _sparse(any_format(ctx, partial(_sparse, indexed=False)), indexed=False)
    plain = replace(spec, cache=replace(spec.cache, chosen=False), shared_index=False)
    weights = make_weights(spec, ctx.rng("weights"))
    x = normal(ctx.rng("inputs"), 12, spec.hidden)
    choice = torch.tensor([[s if s <= t else -1 for s in range(12)] for t in range(12)], dtype=torch.int32)
    dense = {loaded.id: loaded for loaded in ctx.target.load(ctx, plain, weights)}
    for loaded in ctx.target.load(ctx, spec, weights):
        other = dense[loaded.id]
        if sorted(other.answered_by) != sorted(loaded.answered_by):
            ctx.not_applicable(f"{loaded.id}: other parts than without a choice: {', '.join(loaded.answered_by)}")
        plan = scattered(((7,), (1,), (4,)), first_page_size(ctx, loaded), ctx.rng("pages"))
        sparse, full = run_sparse(ctx, loaded, plan, x, choice), run_sparse(ctx, other, plan, x, None)
        ctx.require(torch.equal(sparse, full), f"{loaded.id}: with all tokens chosen it is not dense attention")


def run_sparse(ctx: Context, loaded: Loaded, plan: Plan, x: torch.Tensor, choice: torch.Tensor | None) -> torch.Tensor:
    """One sequence along the plan, `choice` handed on to each step."""
    loaded.allocate(plan.pages, plan.page_size)
    out = []
    for step, ((_, span),) in batches(plan):
        if choice is not None:
            step.hand_on(choice[span])
        out.append(ctx.target.call(loaded.module, x[span], step))
    return torch.cat(out)
