"""Branches with recurrent states, where a backend has them: scattered slots, steps of every kind, wide heads."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from ktcore.conformance.case import Case, Check, Context
from ktcore.conformance.data.batches import Plan, scattered
from ktcore.conformance.data.memory import make_weights, values
from ktcore.conformance.levels.operator import any_format, normal, run_sequences
from ktcore.conformance.levels.specs import delta_net, kimi_delta
from ktcore.conformance.target import Loaded
from ktcore.conformance.tolerance import compare
from ktcore.conformance.truth.arithmetic import EXACT, Arithmetic
from ktcore.conformance.truth.delta_net import delta_net as delta_truth
from ktcore.conformance.truth.kda import kimi_delta as kimi_truth
from ktcore.ops import GatedDeltaNetSpec, KimiDeltaSpec

RAGGED = ((5, 33, 1, 0), (1, 1, 1, 2), (3, 1, 20, 1), (1, 1, 1, 1))
PAGE, SPARE = 16, 2
BOUNDED = {"lower_bound": -5.0}


@dataclass(frozen=True)
class Kind:
    """An operator: how its spec is made, what is right, and the least shape that has all of it."""

    spec_type: type[Any]
    make: Callable[..., Any]
    truth: Callable[[Any, dict[str, torch.Tensor], torch.Tensor, Arithmetic], torch.Tensor]
    small: Mapping[str, object]


DELTA = Kind(GatedDeltaNetSpec, delta_net, delta_truth, {"key_heads": 2, "value_heads": 4, "dim": 32})
KIMI = Kind(KimiDeltaSpec, kimi_delta, kimi_truth, {"heads": 3, "dim": 32})


def cases() -> list[Case]:
    """Shapes, then what happens to slots."""
    few = ((6, 1), (1, 1))
    wide = {"key_heads": 1, "value_heads": 2, "dim": 128}
    return [
        *_common(DELTA, wide),
        _case(DELTA, "tiled", "value heads in another order", partial(_check, DELTA, {"tiled": True}, few)),
        _case(DELTA, "sigmoid-gate", "another gate of the result", partial(_check, DELTA, {"sigmoid_gate": True}, few)),
        *_common(KIMI, {"heads": 2, "dim": 128}),
        _case(KIMI, "bounded", "a decay with a bound", partial(_check, KIMI, BOUNDED, ((70, 3), (1, 20)))),
        _case(KIMI, "bounded-log", "the same of logarithms", partial(_check, KIMI, BOUNDED | {"decay_log": True}, few)),
    ]


def _common(kind: Kind, wide: Mapping[str, object]) -> list[Case]:
    few = ((6, 1), (1, 1))
    check = partial(partial, _check, kind)
    return [
        _case(kind, "ragged", "four sequences of different age", check({}, RAGGED)),
        _case(kind, "one-token", "a first and only token", check({}, ((1,),))),
        _case(kind, "head-128", "heads 128 wide", check(wide, ((9,), (1,)))),
        _case(kind, "long", "150 tokens, in chunks", check({}, ((70,), (79,), (1,)))),
        _case(kind, "width-3", "a convolution over three tokens", check({"width": 3}, ((1, 2), (1, 6)))),
        _case(kind, "decay-log", "logarithms of the rates", check({"decay_log": True}, few)),
        _case(kind, "no-residual", "the branch alone", check({"residual": False}, few)),
        _case(kind, "no-norm", "without a norm of the input", check({"normed": False}, few)),
        _case(kind, "reused-slots", "a new sequence in the slot of one that ended", partial(_reused, kind)),
        _case(kind, "copied-slots", "a sequence that goes on from a copy of another's state", partial(_copied, kind)),
    ]


def _case(kind: Kind, name: str, about: str, run: Check) -> Case:
    op = kind.spec_type.op
    return Case(f"L3.{op}.{name}", 3, op, about, run)


def _spec(ctx: Context, kind: Kind, shape: Mapping[str, object]) -> Any:
    if not any(i.spec_type is kind.spec_type for i in ctx.target.implementations):
        ctx.not_applicable(f"no {ctx.target.name}.* implementation of {kind.spec_type.op}")
    shape = {**kind.small, **shape}
    return kind.make(**shape, fmt=any_format(ctx, lambda f: kind.make(**shape, fmt=f)))


def _check(kind: Kind, shape: Mapping[str, object], steps: Sequence[Sequence[int]], ctx: Context) -> None:
    spec = _spec(ctx, kind, shape)
    plan = scattered(steps, PAGE, ctx.rng("pages"))
    order = ctx.rng("slots").permutation(len(plan.tables) + SPARE).tolist()
    plan = replace(plan, slots=tuple(order[: len(plan.tables)]))
    _each(ctx, kind, spec, [plan], len(order))


def _reused(kind: Kind, ctx: Context) -> None:
    spec = _spec(ctx, kind, {})
    first = replace(scattered(((20,), (1,)), PAGE, ctx.rng("pages")), slots=(1,))
    _each(ctx, kind, spec, [first, replace(first, steps=((1,), (9,)))], 3)


def _each(ctx: Context, kind: Kind, spec: Any, plans: list[Plan], slots: int) -> None:
    weights = make_weights(spec, ctx.rng("weights"))
    known, rng = values(weights), ctx.rng("inputs")
    inputs = [[normal(rng, n, spec.hidden) for n in plan.lengths()] for plan in plans]
    flat = [x for each in inputs for x in each]
    exact = torch.cat([kind.truth(spec, known, x, EXACT) for x in flat])
    for loaded in ctx.target.load(ctx, spec, weights):
        _allocate(ctx, loaded, slots)
        got = [y for plan, x in zip(plans, inputs, strict=True) for y in run_sequences(ctx, loaded, plan, x)]
        own = torch.cat([kind.truth(spec, known, x, Arithmetic.of(loaded.precision)) for x in flat])
        compare(ctx, torch.cat(got), exact, own, f"{loaded.id}: result")


def _copied(kind: Kind, ctx: Context) -> None:
    """Eight tokens in slot 0; its state goes to slot 2, from where another sequence goes on with tokens of its own."""
    spec = _spec(ctx, kind, {})
    weights = make_weights(spec, ctx.rng("weights"))
    known, rng = values(weights), ctx.rng("inputs")
    begin, first, second = normal(rng, 8, spec.hidden), normal(rng, 5, spec.hidden), normal(rng, 5, spec.hidden)
    wholes = [torch.cat((begin, more)) for more in (first, second)]
    exact = torch.cat([kind.truth(spec, known, x, EXACT) for x in wholes])
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
        own = torch.cat([kind.truth(spec, known, x, Arithmetic.of(loaded.precision)) for x in wholes])
        together = torch.cat((got[0], got[1], got[0], got[2]))
        compare(ctx, together, exact, own, f"{loaded.id}: result")


def _allocate(ctx: Context, loaded: Loaded, slots: int) -> None:
    ctx.require(bool(loaded.states), f"{loaded.id} holds no recurrent states")
    loaded.allocate_states(slots)
