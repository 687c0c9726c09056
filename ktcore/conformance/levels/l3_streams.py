"""Residual streams, where a backend has them: hyper-connections and gated streams around an MLP, and their ends."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch

from ktcore.conformance.case import Case, Check, Context
from ktcore.conformance.levels.operator import check, normal
from ktcore.conformance.levels.specs import linear, mlp, norm
from ktcore.conformance.truth.streams import stream_branch, stream_end
from ktcore.ops import GatedStreamsSpec, HyperConnectionSpec, Spec, StreamBranchSpec, StreamEndSpec

HIDDEN, STREAMS, RANK = 128, 4, 32
OPERATORS = (HyperConnectionSpec, GatedStreamsSpec, StreamBranchSpec, StreamEndSpec)


def cases() -> list[Case]:
    """Both kinds around a branch, then ends."""
    around = partial(_around, _hyper)
    return [
        _branch("mixed", "hyper-connections, mixed by a doubly stochastic matrix", partial(around, 5, 1.0)),
        _branch("one-token", "a single token", partial(around, 1, 1.0)),
        _branch("67-tokens", "more tokens than a tile", partial(around, 67, 1.0)),
        _branch("two-streams", "two of them", partial(_around, partial(_hyper, streams=2), 5, 1.0)),
        _branch("eps", "the epsilon of weights and sums", partial(_around, partial(_hyper, eps=0.1), 5, 1.0)),
        _branch("rms-eps", "the epsilon of the root, beside small values", partial(around, 5, 1e-3)),
        _branch("gated", "gated streams with zero-centred norms", partial(_around, _gated, 5, 1.0)),
        _branch("gated-67-tokens", "more tokens than a tile", partial(_around, _gated, 67, 1.0)),
        _branch("gated-eps", "the epsilon of their norms, beside small values", partial(_around, _gated, 5, 1e-3)),
        _end("weighted", "weights of its own, and a norm", partial(_ends, lambda: _hyper(leave=False), True)),
        _end("mean", "the streams' mean, and a norm", partial(_ends, lambda: None, True)),
        _end("gated", "gated streams without injection or norm", partial(_ends, lambda: _gated(leave=False), False)),
    ]


def _branch(name: str, about: str, run: Check) -> Case:
    return Case(f"L3.stream_branch.{name}", 3, "stream_branch", about, run)


def _end(name: str, about: str, run: Check) -> Case:
    return Case(f"L3.stream_end.{name}", 3, "stream_end", about, run)


def _hyper(leave: bool = True, streams: int = STREAMS, eps: float = 1e-6) -> HyperConnectionSpec:
    return HyperConnectionSpec(HIDDEN, streams, eps, 1e-5, 4 if leave else 0, "mixed" if leave else "")


def _gated(leave: bool = True) -> GatedStreamsSpec:
    width = STREAMS * HIDDEN
    down, up = linear(width, RANK, "F32"), linear(RANK, width, "F32")
    return GatedStreamsSpec(HIDDEN, STREAMS, 1e-5, down, up, linear(width, STREAMS, "F32") if leave else None, 1.0)


def _around(make: Callable[[], HyperConnectionSpec | GatedStreamsSpec], tokens: int, size: float, ctx: Context) -> None:
    _asked(ctx)
    mix = make()
    spec = StreamBranchSpec(mix, _bare(256))
    x = size * normal(ctx.rng("x"), tokens, mix.streams * HIDDEN)
    check(ctx, spec, [x], lambda w, a: stream_branch(spec, w, x, a))


def _ends(make: Callable[[], Spec | None], normed: bool, ctx: Context) -> None:
    _asked(ctx)
    spec = StreamEndSpec(HIDDEN, STREAMS, make(), norm(HIDDEN) if normed else None)
    x: torch.Tensor = normal(ctx.rng("x"), 5, STREAMS * HIDDEN)
    check(ctx, spec, [x], lambda w, a: stream_end(spec, w, x, a))


def _bare(wide: int) -> Spec:
    """An MLP with a norm and without a residual."""
    branch = mlp(HIDDEN, wide, "F32")
    return replace(branch, residual=False)


def _asked(ctx: Context) -> None:
    if not any(i.spec_type in OPERATORS for i in ctx.target.implementations):
        ctx.not_applicable(f"no {ctx.target.name}.* implementation of residual streams")
