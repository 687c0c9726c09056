"""Linear projections: every weight format, odd shapes, extreme inputs."""

from __future__ import annotations

from functools import partial

import torch

from ktcore.conformance.case import Case, Check, Context
from ktcore.conformance.data.blocks import FORMATS
from ktcore.conformance.data.memory import make_weights, values
from ktcore.conformance.levels.operator import any_format, check, normal
from ktcore.conformance.levels.specs import linear
from ktcore.conformance.tolerance import compare
from ktcore.conformance.truth import small
from ktcore.conformance.truth.arithmetic import EXACT, Arithmetic
from ktcore.ops import LinearSpec

WRONG_WIDTH = 32


def cases() -> list[Case]:
    """Two cases a format, and the special ones in a format that the backend takes."""
    found = []
    for fmt in FORMATS:
        found += [
            _case(
                f"{fmt}.7x512x100",
                "seven tokens, rows that fill no whole panel",
                partial(_shape, fmt, 7, 512, 100),
                fmt,
            ),
            _case(f"{fmt}.one-token", "a single token", partial(_shape, fmt, 1, 256, 64), fmt),
        ]
    return [
        *found,
        _case("133-tokens", "more tokens than a tile, no multiple of anything", partial(_shape, None, 133, 256, 96)),
        _case("deep", "a long reduction", partial(_shape, None, 3, 7168, 32)),
        _case("wide", "more rows than a core takes at once", partial(_shape, None, 2, 256, 4099)),
        _case("bias", "the bias is added", _bias),
        _case("zero-input", "zeros give exactly zero", _zeros),
        _case("outliers", "one value a thousand times the others", partial(_scaled, 1000.0)),
        _case("tiny-input", "inputs near 1e-6 keep their relative accuracy", partial(_scaled, 1e-6)),
        _case("strided-input", "rows that do not lie one behind the other", _strided),
        _case("not-a-number", "a NaN reaches its token's result and no other token's", _nan),
        _case("wrong-width", "an input of the wrong width is an error, not a wrong result", _wrong_width),
    ]


def _case(name: str, about: str, run: Check, fmt: str | None = None) -> Case:
    return Case(f"L2.linear.{name}", 2, "linear", about, run, fmt)


def _truth(spec: LinearSpec, x: torch.Tensor) -> object:
    return lambda w, a: small.linear(spec, w, x, a)


def _pick(ctx: Context, inside: int = 256, outside: int = 64, bias: bool = False) -> LinearSpec:
    fmt = any_format(ctx, lambda f: linear(inside, outside, f, bias))
    return linear(inside, outside, fmt, bias)


def _shape(fmt: str | None, tokens: int, inside: int, outside: int, ctx: Context) -> None:
    spec = linear(inside, outside, fmt) if fmt else _pick(ctx, inside, outside)
    x = normal(ctx.rng("x"), tokens, inside)
    check(ctx, spec, [x], _truth(spec, x))  # type: ignore[arg-type]


def _bias(ctx: Context) -> None:
    spec = _pick(ctx, bias=True)
    x = normal(ctx.rng("x"), 5, 256)
    check(ctx, spec, [x], _truth(spec, x))  # type: ignore[arg-type]


def _zeros(ctx: Context) -> None:
    spec = _pick(ctx)
    x = torch.zeros(3, 256)
    x[1] = normal(ctx.rng("x"), 256)
    for loaded in ctx.target.load(ctx, spec, make_weights(spec, ctx.rng("weights"))):
        got = ctx.target.call(loaded.module, x)
        ctx.require(
            bool((got[0] == 0).all() and (got[2] == 0).all()), f"{loaded.id}: zeros gave {got[0].abs().max():.3g}"
        )
        ctx.require(bool(got[1].abs().max() > 0), f"{loaded.id}: a row between zero rows gave zero")


def _scaled(factor: float, ctx: Context) -> None:
    spec = _pick(ctx)
    x = normal(ctx.rng("x"), 6, 256)
    if factor > 1:
        x[torch.arange(6), torch.tensor([0, 15, 16, 100, 254, 255])] *= factor
    else:
        x *= factor
    check(ctx, spec, [x], _truth(spec, x))  # type: ignore[arg-type]


def _strided(ctx: Context) -> None:
    spec = _pick(ctx)
    x = normal(ctx.rng("x"), 9, 600)
    weights = make_weights(spec, ctx.rng("weights"))
    w = values(weights)
    target, view = ctx.target, x[::2, 40:296]
    for loaded in target.load(ctx, spec, weights):
        there = target.put(x)
        with torch.inference_mode(), target.runtime.use_stream(target.stream):
            got = loaded.module(there[::2, 40:296])
        own = small.linear(spec, w, view, Arithmetic.of(loaded.precision))
        compare(ctx, target.get(got), small.linear(spec, w, view, EXACT), own, f"{loaded.id}: result")


def _nan(ctx: Context) -> None:
    spec = _pick(ctx)
    x = normal(ctx.rng("x"), 4, 256)
    x[2, 77] = float("nan")
    for loaded in ctx.target.load(ctx, spec, make_weights(spec, ctx.rng("weights"))):
        got = ctx.target.call(loaded.module, x)
        clean = got[[0, 1, 3]]
        ctx.require(bool(torch.isfinite(clean).all()), f"{loaded.id}: a NaN in one token spoils others")
        ctx.require(bool(got[2].isnan().any()), f"{loaded.id}: a NaN in the input vanished: the result is finite")


def _wrong_width(ctx: Context) -> None:
    spec = _pick(ctx)
    for loaded in ctx.target.load(ctx, spec, make_weights(spec, ctx.rng("weights"))):
        try:
            ctx.target.call(loaded.module, normal(ctx.rng("x"), 2, WRONG_WIDTH))
        except Exception:
            # and the device still works
            ctx.target.call(loaded.module, normal(ctx.rng("y"), 2, 256))
            continue
        ctx.fail(f"{loaded.id}: {WRONG_WIDTH} values a token were taken where the weight has {spec.in_features}")
