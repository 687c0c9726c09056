"""Gated delta net branches, where a backend has them: states in scattered slots, steps of every kind, wide heads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial

import torch

from ktcore.conformance.case import Case, Check, Context
from ktcore.conformance.data.batches import Plan, scattered
from ktcore.conformance.data.memory import make_weights, values
from ktcore.conformance.levels.operator import any_format, normal, run_sequences
from ktcore.conformance.levels.specs import delta_net
from ktcore.conformance.target import Loaded
from ktcore.conformance.tolerance import compare
from ktcore.conformance.truth.arithmetic import EXACT, Arithmetic
from ktcore.conformance.truth.delta_net import delta_net as truth
from ktcore.ops import GatedDeltaNetSpec

RAGGED = ((5, 33, 1, 0), (1, 1, 1, 2), (3, 1, 20, 1), (1, 1, 1, 1))
PAGE, SPARE = 16, 2


def cases() -> list[Case]:
    """Shapes, then what happens to slots."""
    small = {"key_heads": 2, "value_heads": 4, "dim": 32}
    wide = {"key_heads": 1, "value_heads": 2, "dim": 128}
    return [
        _case("ragged", "four sequences of different age", partial(_check, small, RAGGED)),
        _case("one-token", "a first and only token", partial(_check, small, ((1,),))),
        _case("head-128", "heads 128 wide", partial(_check, wide, ((9,), (1,)))),
        _case("long", "150 tokens, in chunks", partial(_check, small, ((70,), (79,), (1,)))),
        _case("width-3", "a convolution over three tokens", partial(_check, dict(small, width=3), ((1, 2), (1, 6)))),
        _case("decay-log", "logarithms of the rates", partial(_check, dict(small, decay_log=True), ((6, 1), (1, 1)))),
        _case("tiled", "value heads in another order", partial(_check, dict(small, tiled=True), ((6, 1), (1, 1)))),
        _case("no-residual", "the branch alone", partial(_check, dict(small, residual=False), ((6, 1), (1, 1)))),
        _case("no-norm", "without a norm of the input", partial(_check, dict(small, normed=False), ((6, 1), (1, 1)))),
        _case("reused-slots", "a new sequence in the slot of one that ended", _reused),
        _case("copied-slots", "a sequence that goes on from a copy of another's state", _copied),
    ]  # fmt: skip


def _case(name: str, about: str, run: Check) -> Case:
    return Case(f"L3.gated_delta_net.{name}", 3, "gated_delta_net", about, run)


def _spec(ctx: Context, shape: Mapping[str, object]) -> GatedDeltaNetSpec:
    if not any(i.spec_type is GatedDeltaNetSpec for i in ctx.target.implementations):
        ctx.not_applicable(f"no {ctx.target.name}.* implementation of gated_delta_net")
    return delta_net(**shape, fmt=any_format(ctx, lambda f: delta_net(**shape, fmt=f)))  # type: ignore[arg-type]


def _check(shape: Mapping[str, object], steps: Sequence[Sequence[int]], ctx: Context) -> None:
    spec = _spec(ctx, shape)
    plan = scattered(steps, PAGE, ctx.rng("pages"))
    order = ctx.rng("slots").permutation(len(plan.tables) + SPARE).tolist()
    plan = replace(plan, slots=tuple(order[: len(plan.tables)]))
    _each(ctx, spec, [plan], len(order))


def _reused(ctx: Context) -> None:
    spec = _spec(ctx, {"key_heads": 2, "value_heads": 4, "dim": 32})
    first = replace(scattered(((20,), (1,)), PAGE, ctx.rng("pages")), slots=(1,))
    _each(ctx, spec, [first, replace(first, steps=((1,), (9,)))], 3)


def _each(ctx: Context, spec: GatedDeltaNetSpec, plans: list[Plan], slots: int) -> None:
    weights = make_weights(spec, ctx.rng("weights"))
    known, rng = values(weights), ctx.rng("inputs")
    inputs = [[normal(rng, n, spec.hidden) for n in plan.lengths()] for plan in plans]
    flat = [x for each in inputs for x in each]
    exact = torch.cat([truth(spec, known, x, EXACT) for x in flat])
    for loaded in ctx.target.load(ctx, spec, weights):
        _allocate(ctx, loaded, slots)
        got = [y for plan, x in zip(plans, inputs, strict=True) for y in run_sequences(ctx, loaded, plan, x)]
        own = torch.cat([truth(spec, known, x, Arithmetic.of(loaded.precision)) for x in flat])
        compare(ctx, torch.cat(got), exact, own, f"{loaded.id}: result")


def _copied(ctx: Context) -> None:
    """Eight tokens in slot 0; its state goes to slot 2, from where another sequence goes on with tokens of its own."""
    spec = _spec(ctx, {"key_heads": 2, "value_heads": 4, "dim": 32})
    weights = make_weights(spec, ctx.rng("weights"))
    known, rng = values(weights), ctx.rng("inputs")
    begin, first, second = normal(rng, 8, spec.hidden), normal(rng, 5, spec.hidden), normal(rng, 5, spec.hidden)
    wholes = [torch.cat((begin, more)) for more in (first, second)]
    exact = torch.cat([truth(spec, known, x, EXACT) for x in wholes])
    plan = scattered(((8,), (5,)), PAGE, ctx.rng("pages"))
    for loaded in ctx.target.load(ctx, spec, weights):
        _allocate(ctx, loaded, 3)
        got = run_sequences(ctx, loaded, replace(plan, steps=((8,),), slots=(0,)), [begin])
        with torch.inference_mode(), ctx.target.runtime.use_stream(ctx.target.stream):
            for state in loaded.states:
                state.copy_states([0], [2])
        for slot, more in ((0, first), (2, second)):
            went_on = replace(plan, slots=(slot,))
            got += run_sequences(ctx, loaded, went_on, [torch.cat((begin, more))], skip=1)
        own = torch.cat([truth(spec, known, x, Arithmetic.of(loaded.precision)) for x in wholes])
        together = torch.cat((got[0], got[1], got[0], got[2]))
        compare(ctx, together, exact, own, f"{loaded.id}: result")


def _allocate(ctx: Context, loaded: Loaded, slots: int) -> None:
    ctx.require(bool(loaded.states), f"{loaded.id} holds no recurrent states")
    loaded.allocate_states(slots)
