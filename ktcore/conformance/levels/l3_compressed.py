"""Attention over a window and compressed entries, where a backend has it: its caches, its indexer, whole branches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from ktcore.conformance.case import Case, Check, Context
from ktcore.conformance.data.batches import Plan, batches, scattered
from ktcore.conformance.data.memory import make_weights, values
from ktcore.conformance.levels.l3_sparse import CLEAR, judge
from ktcore.conformance.levels.operator import any_format, normal, run_sequences
from ktcore.conformance.levels.specs_compressed import compressed
from ktcore.conformance.target import Loaded
from ktcore.conformance.tolerance import compare
from ktcore.conformance.truth import compressed as truth
from ktcore.conformance.truth.arithmetic import EXACT, Arithmetic
from ktcore.conformance.truth.small import rms_norm
from ktcore.ops import CompressedAttentionSpec, EntryCacheSpec, EntryIndexerSpec, Spec, WindowCacheSpec

RAGGED = ((5, 33, 1, 0), (1, 1, 1, 2), (3, 1, 20, 1), (1, 1, 1, 1))
LONG = ((129, 300), (1, 1), (130, 85))
SIZES = ((5, 33), (1, 1), (7, 1), (1, 9))
PAGE, SPARE = 16, 2
FLOATS = ("BF16", "F16", "F32")
TOP_K = 3
KINDS: Mapping[str, Mapping[str, Any]] = {
    "window": {},
    "all-entries": {"ratio": 8},
    "chosen-entries": {"ratio": 4, "top_k": TOP_K},
}


def cases() -> list[Case]:
    """Caches, the indexer, then branches, and what happens to slots."""
    plain, over = EntryCacheSpec(4, 64, 8), EntryCacheSpec(4, 64, 4, overlap=True)
    long = EntryCacheSpec(4, 64, 128)
    named = replace(over, chosen=True)
    keys = EntryCacheSpec(16, 32, 4, overlap=True, top_k=TOP_K)
    return [
        _case("window_cache", "ragged", "the last 8 keys", partial(_window, WindowCacheSpec(4, 64, 8))),
        _case("entry_cache", "plain", "an entry for 8 tokens", partial(_entries, plain, RAGGED)),
        _case("entry_cache", "overlap", "tokens that count for two entries", partial(_entries, over, RAGGED)),
        _case("entry_cache", "long", "windows longer than a page", partial(_entries, long, LONG)),
        _case("entry_cache", "chosen", "entries that are named", partial(_entries, named, RAGGED)),
        _case("entry_cache", "choice", "the best by scores", partial(_choice, keys, RAGGED)),
        _case("entry_indexer", "ragged", "projections, pooling, rotation and choice", _indexer),
        *(_branch(kind, "four sequences of different age", partial(_check, kind, RAGGED, {})) for kind in KINDS),
        _branch("q-eps", "an epsilon as large as queries", partial(_check, "window", SIZES, {"q_eps": 0.5})),
        _branch("no-residual", "the branch alone", partial(_check, "all-entries", SIZES, {"residual": False})),
        _branch("no-norm", "without a norm of the input", partial(_check, "all-entries", SIZES, {"norm": None})),
        *(_branch(f"reused.{k}", "a new sequence where another ended", partial(_reused, k)) for k in KINDS),
        *(_branch(f"copied.{k}", "going on from a copy of another's state", partial(_copied, k)) for k in KINDS),
    ]


def _case(op: str, name: str, about: str, run: Check) -> Case:
    return Case(f"L3.{op}.{name}", 3, op, about, run)


def _branch(name: str, about: str, run: Check) -> Case:
    return _case("compressed_attention", name, about, run)


def _asked(ctx: Context, *kinds: type[Spec]) -> None:
    if not any(i.spec_type in kinds for i in ctx.target.implementations):
        ctx.not_applicable(f"no {ctx.target.name}.* implementation of {' or '.join(kind.op for kind in kinds)}")


def _page(loaded: Loaded) -> int:
    return loaded.page_sizes[0] if loaded.caches else PAGE


def _placed(ctx: Context, loaded: Loaded, steps: Sequence[Sequence[int]]) -> Plan:
    """Scattered pages and slots, allocated."""
    plan = scattered(steps, _page(loaded), ctx.rng("pages"))
    order = ctx.rng("slots").permutation(len(plan.tables) + SPARE).tolist()
    loaded.allocate(plan.pages, plan.page_size)
    loaded.allocate_states(len(order))
    return replace(plan, slots=tuple(order[: len(plan.tables)]))


def _window(spec: WindowCacheSpec, ctx: Context) -> None:
    _asked(ctx, WindowCacheSpec)
    rng = ctx.rng("values")
    lengths = [sum(step[i] for step in RAGGED) for i in range(4)]
    q, k = ([normal(rng, n, *shape) for n in lengths] for shape in ((spec.heads, spec.dim), (spec.dim,)))
    scale = 1.5 * spec.dim**-0.5
    for loaded in ctx.target.load(ctx, spec, {}):
        plan = _placed(ctx, loaded, RAGGED)
        got: list[list[Any]] = [[] for _ in lengths]
        for step, rows in batches(plan):
            new = [torch.cat([t[i][span] for i, span in rows]) for t in (q, k)]
            _deal(got, step.q_start, rows, ctx.target.call(loaded.module.attend, step, *new, scale))
        shown = [truth.in_window(n, spec.window) for n in lengths]
        _compare_seen(ctx, loaded, got, q, k, shown, scale)


def _entries(spec: EntryCacheSpec, steps: Sequence[Sequence[int]], ctx: Context) -> None:
    _asked(ctx, EntryCacheSpec)
    rng = ctx.rng("values")
    lengths = [sum(step[i] for step in steps) for i in range(len(steps[0]))]
    drawn = {n: [normal(rng, length, spec.width) for length in lengths] for n in ("values", "gates")}
    q = [normal(rng, n, spec.heads, spec.dim) for n in lengths]
    scale = 1.5 * spec.dim**-0.5
    picked = [_drawn(ctx, n, spec.ratio) for n in lengths] if spec.chosen else None
    for loaded in ctx.target.load(ctx, spec, {}):
        plan = _placed(ctx, loaded, steps)
        got: list[list[Any]] = [[] for _ in lengths]
        for step, rows in batches(plan):
            new = [torch.cat([t[i][span] for i, span in rows]) for t in (*drawn.values(), q)]
            made, _ = ctx.target.call(loaded.module.pool, step, new[0], new[1])
            ctx.target.call(loaded.module.append, step, made)
            call = loaded.module.attend
            if picked is not None:
                chosen = torch.cat([picked[i][span] for i, span in rows])
                call = partial(call, chosen=ctx.target.put(chosen))
            _deal(got, step.q_start, rows, ctx.target.call(call, step, new[2], scale))
        made = [
            truth.pooled(spec, v.double(), g.double()) for v, g in zip(drawn["values"], drawn["gates"], strict=True)
        ]
        shown = [truth.visible(n, spec.ratio) for n in lengths]
        if picked is not None:
            shown = [s & (p[:, :, None] == torch.arange(s.shape[1])).any(1) for s, p in zip(shown, picked, strict=True)]
        _compare_seen(ctx, loaded, got, q, made, shown, scale)


def _drawn(ctx: Context, length: int, ratio: int) -> torch.Tensor:
    """For each token up to three of the entries that it sees, rising, then -1: int32 [length, 3]."""
    rng, made = ctx.rng(f"choices {length}"), torch.full((length, TOP_K), -1, dtype=torch.int32)
    for t in range(length):
        some = sorted(rng.permutation((t + 1) // ratio)[:TOP_K].tolist())
        made[t, : len(some)] = torch.tensor(some, dtype=torch.int32)
    return made


def _deal(got: list[list[Any]], starts: Sequence[int], rows: list[tuple[int, slice]], seen: Any) -> None:
    for at, (i, span) in zip(starts, rows, strict=False):
        got[i].append([part[at : at + span.stop - span.start] for part in seen])


def _compare_seen(
    ctx: Context,
    loaded: Loaded,
    got: list[list[Any]],
    queries: list[torch.Tensor],
    keys: list[torch.Tensor],
    shown: list[torch.Tensor],
    scale: float,
) -> None:
    results: list[list[torch.Tensor]] = []
    for a in (EXACT, Arithmetic.of(loaded.precision)):
        pairs = [truth.seen(a.cast(q), a.stored(k), scale, s) for q, k, s in zip(queries, keys, shown, strict=True)]
        results.append([torch.cat([pair[part] for pair in pairs]) for part in (0, 1)])
    for part, what in enumerate(("values", "logs of sums")):
        found = torch.cat([torch.cat([piece[part] for piece in pieces]) for pieces in got])
        there = torch.isfinite(results[0][1])
        if part:
            ctx.require(bool((found[~there] == -float("inf")).all()), f"{loaded.id}: no -inf where nothing is seen")
        else:
            ctx.require(not bool(found[~there].any()), f"{loaded.id}: values where nothing is seen")
        compare(ctx, found[there], results[0][part][there], results[1][part][there], f"{loaded.id}: {what}")


def _choice(spec: EntryCacheSpec, steps: Sequence[Sequence[int]], ctx: Context) -> None:
    _asked(ctx, EntryCacheSpec)
    rng = ctx.rng("values")
    lengths = [sum(step[i] for step in steps) for i in range(len(steps[0]))]
    shapes = ((spec.width,), (spec.width,), (spec.heads, spec.dim), (spec.heads,))
    drawn = [[normal(rng, n, *shape) for n in lengths] for shape in shapes]
    for loaded in ctx.target.load(ctx, spec, {}):
        got = [torch.empty(0, spec.top_k, dtype=torch.int32) for _ in lengths]
        for step, rows in batches(_placed(ctx, loaded, steps)):
            new = [torch.cat([t[i][span] for i, span in rows]) for t in drawn]
            made, _ = ctx.target.call(loaded.module.pool, step, new[0], new[1])
            ctx.target.call(loaded.module.append, step, made)
            out = ctx.target.call(loaded.module.choose, step, new[2], new[3])
            for at, (i, span) in zip(step.q_start, rows, strict=False):
                got[i] = torch.cat((got[i], out[at : at + span.stop - span.start]))
        for chosen, v, g, q, w in zip(got, *drawn, strict=True):
            both = []
            for a in (EXACT, Arithmetic.of(loaded.precision)):
                made = a.stored(truth.pooled(spec, a.cast(v), a.cast(g)))
                both.append(truth.choice_scores(a.cast(q), a.cast(w), made))
            judge(ctx, loaded, chosen, both[0], both[1], spec.ratio)


def _indexer(ctx: Context) -> None:
    _asked(ctx, EntryIndexerSpec)

    def make(fmt: str) -> EntryIndexerSpec:
        indexer = compressed(fmt, 4, TOP_K).indexer
        assert indexer is not None
        return indexer

    spec = make(any_format(ctx, make, FLOATS))
    weights = make_weights(spec, ctx.rng("weights"))
    known, rng = values(weights), ctx.rng("inputs")
    lengths = [sum(step[i] for step in RAGGED) for i in range(4)]
    inputs, lows = ([normal(rng, n, width) for n in lengths] for width in (spec.hidden, spec.rank))
    for loaded in ctx.target.load(ctx, spec, weights):
        got = [torch.empty(0, TOP_K, dtype=torch.int32) for _ in lengths]
        for step, rows in batches(_placed(ctx, loaded, RAGGED)):
            n, low = (torch.cat([t[i][span] for i, span in rows]) for t in (inputs, lows))
            out = ctx.target.call(loaded.module, n, low, step)
            for at, (i, span) in zip(step.q_start, rows, strict=False):
                got[i] = torch.cat((got[i], out[at : at + span.stop - span.start]))
        for chosen, x, low in zip(got, inputs, lows, strict=True):
            both = (EXACT, Arithmetic.of(loaded.precision))
            exact, own = (truth.index_scores(spec, known, x, low, a) for a in both)
            judge(ctx, loaded, chosen, exact, own, 4)


def _spec(ctx: Context, kind: str, changes: Mapping[str, Any]) -> CompressedAttentionSpec:
    _asked(ctx, CompressedAttentionSpec)
    made = {**KINDS[kind], **{key: value for key, value in changes.items() if key == "q_eps"}}
    rest = {key: value for key, value in changes.items() if key != "q_eps"}
    fmt = any_format(ctx, lambda f: compressed(f, **made), FLOATS)
    return replace(compressed(fmt, **made), **rest)


def _check(kind: str, steps: Sequence[Sequence[int]], changes: Mapping[str, Any], ctx: Context) -> None:
    spec = _spec(ctx, kind, changes)
    lengths = [sum(step[i] for step in steps) for i in range(len(steps[0]))]
    small = 1e-2 if "q_eps" in changes else 1.0
    _each(ctx, spec, lengths, small, lambda loaded, x: run_sequences(ctx, loaded, _placed(ctx, loaded, steps), x))


def _reused(kind: str, ctx: Context) -> None:
    """The second sequence has the first one's pages and slot."""
    spec = _spec(ctx, kind, {})

    def run(loaded: Loaded, x: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        plan = _placed(ctx, loaded, ((30,), (1,)))
        first = _along(ctx, loaded, plan, x[0])
        return [first, _along(ctx, loaded, replace(plan, steps=((1,), (20,))), x[1])]

    _each(ctx, spec, [31, 21], 1.0, run)


def _copied(kind: str, ctx: Context) -> None:
    """Eighteen tokens in slot 0, in the middle of windows; from there one sequence goes on, and one from a copy."""
    spec = _spec(ctx, kind, {})

    def run(loaded: Loaded, x: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        page = _page(loaded)
        plan = replace(scattered(((18,), (13,)), page, ctx.rng("pages")), slots=(0,))
        loaded.allocate(plan.pages, page)
        loaded.allocate_states(3)
        begin = _along(ctx, loaded, replace(plan, steps=((18,),)), x[0])
        with torch.inference_mode(), ctx.target.runtime.use_stream(ctx.target.stream):
            for state in loaded.states:
                state.copy_states([0], [2])
        ends = [_along(ctx, loaded, replace(plan, slots=(slot,)), x[i], skip=1) for i, slot in ((0, 0), (1, 2))]
        return [torch.cat((begin, end)) for end in ends]

    _each(ctx, spec, [31, 31], 1.0, run, same=18)


def _along(ctx: Context, loaded: Loaded, plan: Plan, x: torch.Tensor, skip: int = 0) -> torch.Tensor:
    """One sequence along the plan, without allocating anew."""
    out = [ctx.target.call(loaded.module, x[span], step) for step, ((_, span),) in batches(plan)[skip:]]
    return torch.cat(out)


def _each(
    ctx: Context, spec: CompressedAttentionSpec, lengths: Sequence[int], size: float, run: Any, same: int = 0
) -> None:
    """Run sequences, and hold them against the truth.

    Args:
        run: (loaded, inputs) -> outputs.
        same: how many tokens of the beginning the sequences share.
    """
    weights = make_weights(spec, ctx.rng("weights"))
    known = values(weights)
    inputs = _clear(ctx, spec, known, lengths, same)
    if size != 1.0:
        inputs = [x * size ** (torch.arange(len(x)) % 3)[:, None] for x in inputs]
    choices = [_best(spec, known, x) for x in inputs]
    exact = torch.cat([truth.attention(spec, known, x, EXACT, c) for x, c in zip(inputs, choices, strict=True)])
    for loaded in ctx.target.load(ctx, spec, weights):
        got = run(loaded, inputs)
        a = Arithmetic.of(loaded.precision)
        own = torch.cat([truth.attention(spec, known, x, a, c) for x, c in zip(inputs, choices, strict=True)])
        compare(ctx, torch.cat(got), exact, own, f"{loaded.id}: result")


def _clear(
    ctx: Context, spec: CompressedAttentionSpec, known: dict[str, torch.Tensor], lengths: Sequence[int], same: int
) -> list[torch.Tensor]:
    """Inputs whose choices no rounding turns."""
    found: list[torch.Tensor] = []
    for at, length in enumerate(lengths):
        for i in range(4000):
            x = normal(ctx.rng(f"inputs {at} {i}"), length, spec.hidden)
            if same and found:
                x[:same] = found[0][:same]
            if spec.indexer is None or truth.margin(_scores(spec, known, x), spec.indexer.entries.ratio, TOP_K) > CLEAR:
                found.append(x)
                break
        else:
            raise AssertionError("no inputs with clear choices were found")
    return found


def _best(spec: CompressedAttentionSpec, known: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor | None:
    if spec.indexer is None:
        return None
    return truth.best(_scores(spec, known, x), spec.indexer.entries.ratio, TOP_K)


def _scores(spec: CompressedAttentionSpec, known: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    assert spec.indexer is not None, "without an indexer there are no scores"
    n = rms_norm(spec.norm, known, x, EXACT, "norm.") if spec.norm else EXACT.cast(x)
    low = truth.low_query(spec, known, n, EXACT)
    return truth.index_scores(spec.indexer, known, n, low, EXACT, "indexer.")
