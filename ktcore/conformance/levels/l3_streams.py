"""Residual streams, where a backend has them: hyper-connections and gated streams, around a branch, and their ends."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from ktcore.conformance.case import Case, Check, Context
from ktcore.conformance.data.memory import make_weights, values
from ktcore.conformance.levels.operator import any_format, check, normal
from ktcore.conformance.levels.specs import linear, mlp, norm
from ktcore.conformance.tolerance import compare
from ktcore.conformance.truth.arithmetic import EXACT, Arithmetic
from ktcore.conformance.truth.streams import stream_branch, stream_end, streams_after
from ktcore.ops import GatedStreamsSpec, HyperConnectionSpec, Spec, StreamBranchSpec, StreamEndSpec

HIDDEN, STREAMS, RANK = 128, 4, 256
Mix = HyperConnectionSpec | GatedStreamsSpec
MIXES = (HyperConnectionSpec, GatedStreamsSpec)


def cases() -> list[Case]:
    """Both kinds alone, then around a branch, then ends."""
    hyper, gated = partial(_alone, _hyper), partial(_alone, _gated)
    return [
        _hyper_case("mixed", "mixed by a doubly stochastic matrix", partial(hyper, 5, 1.0)),
        _hyper_case("one-token", "a single token", partial(hyper, 1, 1.0)),
        _hyper_case("67-tokens", "more tokens than a tile", partial(hyper, 67, 1.0)),
        _hyper_case("two-streams", "two of them", partial(_alone, partial(_hyper, streams=2), 5, 1.0)),
        _hyper_case("wide", "streams of 1104 values", partial(_alone, partial(_hyper, hidden=1104), 3, 1.0)),
        _hyper_case("eps", "the epsilon of weights and sums", partial(_alone, partial(_hyper, eps=0.1), 5, 1.0)),
        _hyper_case("rms-eps", "the epsilon of the root, beside small values", partial(hyper, 5, 1e-3)),
        _gated_case("zero-centred", "with zero-centred norms", partial(gated, 5, 1.0)),
        _gated_case("one-token", "a single token", partial(gated, 1, 1.0)),
        _gated_case("67-tokens", "more tokens than a tile", partial(gated, 67, 1.0)),
        _gated_case("eps", "the epsilon of the norms, beside small values", partial(gated, 5, 1e-3)),
        _case("stream_branch", "hyper", "hyper-connections around an MLP", partial(_around, _hyper)),
        _case("stream_branch", "gated", "gated streams around an MLP", partial(_around, _gated)),
        _end("weighted", "weights of its own, and a norm", partial(_ends, lambda ctx: _hyper(ctx, leave=False), True)),
        _end("mean", "the streams' mean, and a norm", partial(_ends, lambda ctx: None, True)),
        _end("gated", "gates without injection or norm", partial(_ends, lambda ctx: _gated(ctx, leave=False), False)),
    ]


def _case(op: str, name: str, about: str, run: Check) -> Case:
    return Case(f"L3.{op}.{name}", 3, op, about, run)


_hyper_case, _gated_case, _end = (partial(_case, op) for op in ("hyper_connection", "gated_streams", "stream_end"))


def _hyper(
    ctx: Context, leave: bool = True, streams: int = STREAMS, eps: float = 1e-6, hidden: int = HIDDEN
) -> HyperConnectionSpec:
    return HyperConnectionSpec(hidden, streams, eps, 1e-5, 4 if leave else 0, "mixed" if leave else "")


def _gated(ctx: Context, leave: bool = True) -> GatedStreamsSpec:
    width = STREAMS * HIDDEN

    def make(fmt: str) -> GatedStreamsSpec:
        down, up = linear(width, RANK, fmt), linear(RANK, width, fmt)
        inject = linear(width, STREAMS, "F32") if leave else None
        return GatedStreamsSpec(HIDDEN, STREAMS, 1e-5, down, up, inject, 1.0)

    return make(any_format(ctx, make))


def _alone(make: Callable[[Context], Mix], tokens: int, size: float, ctx: Context) -> None:
    """What the branch reads, and the streams after it gave something."""
    spec = make(ctx)
    _asked(ctx, type(spec))
    rng = ctx.rng("x")
    x, y = size * normal(rng, tokens, spec.streams * spec.hidden), size * normal(rng, tokens, spec.hidden)
    weights = make_weights(spec, ctx.rng("weights"))
    known = values(weights)
    exact = streams_after(spec, known, x, y, EXACT)
    for loaded in ctx.target.load(ctx, spec, weights):
        got = ctx.target.call(partial(_through, loaded.module), x, y)
        own = streams_after(spec, known, x, y, Arithmetic.of(loaded.precision))
        compare(ctx, got[0], exact[0], own[0], f"{loaded.id}: what the branch reads")
        compare(ctx, got[1], exact[1], own[1], f"{loaded.id}: the streams after it")


def _through(module: Any, x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    inside, carry = module.enter(x)
    return inside, module.leave(x, y, carry)


def _around(make: Callable[[Context], Mix], ctx: Context) -> None:
    _asked(ctx, *MIXES, StreamBranchSpec)
    spec = StreamBranchSpec(make(ctx), replace(mlp(HIDDEN, 256, "F32"), residual=False))
    x = normal(ctx.rng("x"), 5, STREAMS * HIDDEN)
    check(ctx, spec, [x], lambda w, a: stream_branch(spec, w, x, a))


def _ends(make: Callable[[Context], Spec | None], normed: bool, ctx: Context) -> None:
    _asked(ctx, *MIXES, StreamEndSpec)
    spec = StreamEndSpec(HIDDEN, STREAMS, make(ctx), norm(HIDDEN) if normed else None)
    x = normal(ctx.rng("x"), 5, STREAMS * HIDDEN)
    check(ctx, spec, [x], lambda w, a: stream_end(spec, w, x, a))


def _asked(ctx: Context, *kinds: type[Spec]) -> None:
    if not any(i.spec_type in kinds for i in ctx.target.implementations):
        ctx.not_applicable(f"no {ctx.target.name}.* implementation of {' or '.join(kind.op for kind in kinds)}")
