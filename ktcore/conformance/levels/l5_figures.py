"""Figures for information: how long typical calls take. They pass or fail nothing."""

from __future__ import annotations

import time
from functools import partial

import torch

from ktcore.conformance.case import Case, Context
from ktcore.conformance.data.memory import make_weights
from ktcore.conformance.levels.operator import any_format, normal
from ktcore.conformance.levels.specs import linear

REPEATS = 20


def cases() -> list[Case]:
    """Copies and one projection, for one token and for many."""
    return [
        Case("L5.linear.1x1024x1024", 5, "linear", "microseconds for one token", partial(_linear, 1)),
        Case("L5.linear.64x1024x1024", 5, "linear", "microseconds for 64 tokens", partial(_linear, 64)),
        Case("L5.copy.1-MiB", 5, "copy", "microseconds there and back", _copy),
        Case("L5.stream.event", 5, "stream", "microseconds to record an event and wait for it", _event),
    ]


def _timed(ctx: Context, call: object) -> None:
    best = float("inf")
    for _ in range(REPEATS):
        started = time.perf_counter()
        call()  # type: ignore[operator]
        best = min(best, time.perf_counter() - started)
    ctx.timings["microseconds"] = round(best * 1e6, 1)


def _linear(tokens: int, ctx: Context) -> None:
    spec = linear(1024, 1024, any_format(ctx, lambda f: linear(1024, 1024, f)))
    loaded = ctx.target.load(ctx, spec, make_weights(spec, ctx.rng("weights")))[0]
    x, target = ctx.target.put(normal(ctx.rng("x"), tokens, 1024)), ctx.target

    def call() -> None:
        with torch.inference_mode(), target.runtime.use_stream(target.stream):
            loaded.module(x)
        target.runtime.synchronize(target.stream)

    _timed(ctx, call)


def _copy(ctx: Context) -> None:
    runtime, stream = ctx.target.runtime, ctx.target.stream
    host = runtime.pinned_buffer((1 << 18,), torch.float32)
    there = torch.empty(1 << 18, device=runtime.device)

    def call() -> None:
        runtime.copy_async(there, host, stream)
        runtime.copy_async(host, there, stream)
        runtime.synchronize(stream)

    _timed(ctx, call)


def _event(ctx: Context) -> None:
    runtime, stream = ctx.target.runtime, ctx.target.stream
    _timed(ctx, lambda: runtime.synchronize(runtime.record_event(stream)))
