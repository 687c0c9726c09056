"""Gated MLP: every weight format, bare and as a branch."""

from __future__ import annotations

from functools import partial

from ktcore.conformance.case import Case, Check, Context
from ktcore.conformance.data.blocks import FORMATS
from ktcore.conformance.levels.operator import any_format, check, normal
from ktcore.conformance.levels.specs import mlp
from ktcore.conformance.truth import small
from ktcore.ops import MLPSpec


def cases() -> list[Case]:
    """One case a format, then shapes."""
    found = [
        _case(f"{fmt}.branch", "norm, gate, up, down, residual", partial(_check, fmt, 5, 256, 256, True), fmt)
        for fmt in FORMATS
    ]
    return [
        *found,
        _case("bare", "without norm and residual, as the shared expert is", partial(_check, None, 5, 256, 512, False)),
        _case("one-token", "a single token", partial(_check, None, 1, 256, 512, True)),
        _case("67-tokens", "more tokens than a tile", partial(_check, None, 67, 256, 512, True)),
        _case("wide", "eleven times wider than its input", partial(_check, None, 2, 256, 2816, True)),
    ]


def _case(name: str, about: str, run: Check, fmt: str | None = None) -> Case:
    return Case(f"L2.mlp.{name}", 2, "mlp", about, run, fmt)


def _check(fmt: str | None, tokens: int, hidden: int, wide: int, branch: bool, ctx: Context) -> None:
    def make(name: str) -> MLPSpec:
        return mlp(hidden, wide, name, branch=branch)

    spec = make(fmt or any_format(ctx, make))
    x = normal(ctx.rng("x"), tokens, hidden)
    check(ctx, spec, [x], lambda w, a: small.mlp(spec, w, x, a))
