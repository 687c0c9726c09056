"""Whole mixture-of-experts branches: router, experts, shared part, norm and residual together."""

from __future__ import annotations

from functools import partial

import torch

from ktcore.conformance.case import Case, Check, Context
from ktcore.conformance.data.blocks import FORMATS
from ktcore.conformance.data.memory import make_weights, values
from ktcore.conformance.levels.operator import any_format, normal
from ktcore.conformance.levels.specs import moe
from ktcore.conformance.tolerance import compare
from ktcore.conformance.truth import moe as truth
from ktcore.conformance.truth.arithmetic import EXACT, Arithmetic
from ktcore.ops import MoESpec

CLEAR = 1e-3


def cases() -> list[Case]:
    """Formats on few experts, then counts."""
    found = [
        _case(f"{fmt}.branch", "a whole branch", partial(_check, partial(moe, 256, 8, 2, 256), fmt, 7), fmt)
        for fmt in FORMATS
    ]
    found += [
        _case(f"{n}-experts", "a whole branch", partial(_check, partial(moe, 64, n, 8, 32), "F32", 9))
        for n in (128, 256, 384)
    ]
    return [
        *found,
        _case(
            "no-shared", "without a shared part", partial(_check, partial(moe, 256, 16, 4, 256, shared=False), None, 5)
        ),
        _case("one-token", "a single token", partial(_check, partial(moe, 256, 16, 4, 256), None, 1)),
    ]


def _case(name: str, about: str, run: Check, fmt: str | None = None) -> Case:
    return Case(f"L2.moe.{name}", 2, "moe", about, run, fmt)


def _check(make: partial[MoESpec], fmt: str | None, tokens: int, ctx: Context) -> None:
    check_branch(ctx, make(fmt or any_format(ctx, make)), tokens)


def check_branch(ctx: Context, spec: MoESpec, tokens: int) -> None:
    """Compare the tokens whose experts were chosen clearly."""
    weights = make_weights(spec, ctx.rng("weights"))
    # a few more than needed: those with a doubtful choice are left out
    known, x = values(weights), normal(ctx.rng("x"), 2 * tokens, spec.hidden)
    before = normal(ctx.rng("before"), 2 * tokens, spec.hidden) if spec.early_router else None
    clear = truth.moe(spec, known, x, EXACT, before)[1] > CLEAR
    x, before = x[clear][:tokens], None if before is None else before[clear][:tokens]
    ctx.require(x.shape[0] == tokens, "the case is badly made: most choices are ties")
    exact, _ = truth.moe(spec, known, x, EXACT, before)
    for loaded in ctx.target.load(ctx, spec, weights):
        own, _ = truth.moe(spec, known, x, Arithmetic.of(loaded.precision), before)
        got: torch.Tensor = ctx.target.call(loaded.module, *((x,) if before is None else (x, before)))
        compare(ctx, got, exact, own, f"{loaded.id}: result")
