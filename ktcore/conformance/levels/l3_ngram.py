"""N-gram embeddings: which rows of the table the last tokens name, and what residual streams get of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from ktcore.conformance.case import Case, Check, Context
from ktcore.conformance.data.batches import Plan, batches, scattered
from ktcore.conformance.data.memory import MemoryCheckpoint, make_weights, values
from ktcore.conformance.levels.operator import any_format, normal
from ktcore.conformance.levels.specs import ngram
from ktcore.conformance.target import Loaded
from ktcore.conformance.tolerance import compare
from ktcore.conformance.truth import ngram as truth
from ktcore.conformance.truth.arithmetic import EXACT, Arithmetic
from ktcore.ops import NGramSpec, PrecededSpec, Spec
from ktcore.weights.ref import Weight, WeightRef

RAGGED = ((5, 17, 1, 0), (1, 1, 1, 33), (3, 1, 20, 1), (1, 1, 1, 1))
PAGE, SPARE, TOKENS = 16, 2, 9
FLOATS = ("BF16", "F16", "F32")

Whole = Callable[[Any, dict[str, torch.Tensor], torch.Tensor, list[int], Arithmetic], torch.Tensor]


def cases() -> list[Case]:
    """The table alone, what is mixed into streams, and a branch behind it."""
    return [
        _table("ragged", "four sequences of different age", _plain_table),
        _table("parts", "a table in several parts", partial(_plain_table, parts=4)),
        _ngram("ragged", "four sequences of different age", partial(_mixed, lambda s: s)),
        _ngram("one-token", "first tokens", partial(_mixed, lambda s: s, steps=((1, 1), (1, 2)))),
        _ngram("eps", "an epsilon as large as embeddings", partial(_mixed, lambda s: replace(s, eps=0.5))),
        _ngram("zero-centred", "norms with 1 + weight", partial(_mixed, lambda s: replace(s, norm_offset=1.0))),
        _ngram("reused-slots", "a new sequence in the slot of one that ended", _reused),
        Case("L3.preceded.ngram", 3, "preceded", "one behind the other", _preceded),
    ]


def _table(name: str, about: str, run: Check) -> Case:
    return Case(f"L3.ngram_table.{name}", 3, "ngram_table", about, run)


def _ngram(name: str, about: str, run: Check) -> Case:
    return Case(f"L3.ngram.{name}", 3, "ngram", about, run)


def _plain_table(ctx: Context, parts: int = 0) -> None:
    spec = ngram(any_format(ctx, lambda f: ngram(f).table, FLOATS)).table

    def whole(s: Any, w: dict[str, torch.Tensor], x: torch.Tensor, ids: list[int], a: Arithmetic) -> torch.Tensor:
        return truth.table(s, a.cast(w["table"]).reshape(-1, s.dim), ids)

    _each(ctx, spec, [_plan(ctx, RAGGED)], whole, parts)


def _mixed(change: Callable[[NGramSpec], NGramSpec], ctx: Context, steps: Sequence[Sequence[int]] = RAGGED) -> None:
    spec = change(ngram(any_format(ctx, ngram, FLOATS)))
    _each(ctx, spec, [_plan(ctx, steps)], truth.ngram)


def _reused(ctx: Context) -> None:
    first = replace(_plan(ctx, ((20,), (1,))), slots=(1,))
    _each(ctx, ngram("F32"), [first, replace(first, steps=((1,), (9,)))], truth.ngram)


def _preceded(ctx: Context) -> None:
    def both(s: Any, w: dict[str, torch.Tensor], x: torch.Tensor, ids: list[int], a: Arithmetic) -> torch.Tensor:
        x = truth.ngram(s.before, w, x, ids, a, "before.")
        return truth.ngram(s.branch, w, x, ids, a, "branch.")

    _each(ctx, PrecededSpec(ngram("F32"), ngram("F32")), [_plan(ctx, RAGGED)], both)


def _plan(ctx: Context, steps: Sequence[Sequence[int]]) -> Plan:
    plan = scattered(steps, PAGE, ctx.rng("pages"))
    order = ctx.rng("slots").permutation(len(plan.tables) + SPARE).tolist()
    return replace(plan, slots=tuple(order[: len(plan.tables)]))


def _each(ctx: Context, spec: Spec, plans: list[Plan], whole: Whole, parts: int = 0) -> None:
    """Along the plans, one after the other on the same slots, against the truth of each sequence at once."""
    weights = make_weights(spec, ctx.rng("weights"))
    known, rng = values(weights), ctx.rng("inputs")
    if parts:
        weights = {"table": _parted(weights["table"], parts)}
    width = ngram("F32").hidden * ngram("F32").streams
    inputs = [[normal(rng, n, width) for n in plan.lengths()] for plan in plans]
    # few different tokens, so that n-grams come again; one of them ends texts
    ids = [[rng.integers(0, TOKENS, n).tolist() for n in plan.lengths()] for plan in plans]
    flat = [pair for xs, ts in zip(inputs, ids, strict=True) for pair in zip(xs, ts, strict=True)]
    exact: list[torch.Tensor] = []
    own: list[torch.Tensor] = []
    for loaded in ctx.target.load(ctx, spec, weights):
        for a, found in ((EXACT, exact), (Arithmetic.of(loaded.precision), own)):
            found[:] = [whole(spec, known, x, i, a) for x, i in flat]
        ctx.require(bool(loaded.states), f"{loaded.id} holds no recurrent states")
        loaded.allocate_states(max(max(plan.slots) for plan in plans) + 1)
        got = [y for plan, x, i in zip(plans, inputs, ids, strict=True) for y in _run(ctx, loaded, plan, x, i)]
        compare(ctx, torch.cat(got), torch.cat(exact), torch.cat(own), f"{loaded.id}: result")


def _parted(weight: Weight, parts: int) -> Weight:
    """The same rows as `parts` tensors."""
    checkpoint, raw, (rows, dim) = MemoryCheckpoint(), weight.raw(), weight.shape
    each = rows // parts
    names = [f"table.{i}" for i in range(parts)]
    for i, name in enumerate(names):
        checkpoint.add(name, (each, dim), weight.format, raw[i * each : (i + 1) * each].reshape(-1).copy())
    return WeightRef.of(checkpoint, *names).open(checkpoint)


def _run(
    ctx: Context, loaded: Loaded, plan: Plan, inputs: list[torch.Tensor], ids: list[list[int]]
) -> list[torch.Tensor]:
    found: list[list[torch.Tensor]] = [[] for _ in inputs]
    alone = ctx.case.operator == "ngram_table"
    for step, rows in batches(plan):
        tokens = [token for i, span in rows for token in ids[i][span]]
        step = replace(step, token_ids=torch.tensor(tokens))
        x = torch.cat([inputs[i][span] for i, span in rows])
        got = ctx.target.call(loaded.module, *(() if alone else (x,)), step)
        for at, (i, span) in zip(step.q_start, rows, strict=False):
            found[i].append(got[at : at + span.stop - span.start])
    return [torch.cat(parts) for parts in found]
