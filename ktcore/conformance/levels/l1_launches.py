"""Host callbacks in the declared mode, and graphs: captured without running, replayed in order."""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable

import torch

from ktcore.backend.runtime import GraphMode, HostCallbackMode
from ktcore.conformance.case import Case, Check, Context

FUNCTION = ctypes.CFUNCTYPE(None, ctypes.c_void_p)
PATIENCE = 20.0
SIZE = 1 << 14


def cases() -> list[Case]:
    """Callbacks, then graphs."""
    return [
        _case("callback.declared", "without callbacks, asking for one is an error", _no_callbacks),
        _case("callback.sees-earlier-work", "copies before it in the stream are done when it runs", _sees),
        _case("callback.holds-later-work", "copies after it in the stream see what it wrote", _holds),
        _case("callback.each-once-in-order", "a hundred run once each, in order, with their own data", _each),
        _case("callback.does-not-block", "launching does not wait for the function", _free),
        _case("graph.declared", "without graphs, asking for one is an error", _no_graphs),
        _case("graph.replay", "capturing runs nothing, every replay runs all", _replay),
        _case("graph.callback", "a captured callback runs at every replay", _graph_callback),
    ]


def _case(name: str, about: str, run: Check) -> Case:
    return Case(f"L1.launch.{name}", 1, "launch", about, run)


def _require_callbacks(ctx: Context) -> None:
    if ctx.target.runtime.host_callback is HostCallbackMode.NONE:
        ctx.not_applicable("the runtime declares no host callbacks")


def _require_graphs(ctx: Context) -> None:
    if ctx.target.runtime.graph is GraphMode.NONE:
        ctx.not_applicable("the runtime declares no graphs")


def _address(function: object) -> int:
    return ctypes.cast(function, ctypes.c_void_p).value or 0  # type: ignore[arg-type]


def _settle(ctx: Context, stream: object) -> None:
    """Wait without holding the interpreter: a callback written in Python needs it."""
    event, limit = ctx.target.runtime.record_event(stream), time.monotonic() + PATIENCE
    while not ctx.target.runtime.event_done(event):
        ctx.require(time.monotonic() < limit, f"a callback did not end within {PATIENCE:g} s")
        time.sleep(0.0005)
    ctx.target.runtime.synchronize(stream)


def _no_callbacks(ctx: Context) -> None:
    if ctx.target.runtime.host_callback is not HostCallbackMode.NONE:
        ctx.not_applicable("the runtime declares host callbacks")
    function = FUNCTION(lambda _: None)
    try:
        ctx.target.runtime.launch_host(ctx.target.stream, _address(function), 0)
    except NotImplementedError:
        return
    ctx.fail("launch_host works, but host callbacks are not declared")


def _sees(ctx: Context) -> None:
    _require_callbacks(ctx)
    runtime, stream = ctx.target.runtime, ctx.target.runtime.new_stream()
    source, back = (runtime.pinned_buffer((SIZE,), torch.float32) for _ in range(2))
    there = torch.empty(SIZE, device=runtime.device)
    seen: list[float] = []
    function = FUNCTION(lambda _: seen.append(float(back.min())))
    for i in range(10):
        source.fill_(float(i + 1))
        runtime.copy_async(there, source, stream)
        runtime.copy_async(back, there, stream)
        runtime.launch_host(stream, _address(function), 0)
        _settle(ctx, stream)
        ctx.require(seen[-1:] == [float(i + 1)], f"round {i}: the callback read {seen[-1:]}, not {i + 1}")


def _holds(ctx: Context) -> None:
    _require_callbacks(ctx)
    runtime, stream = ctx.target.runtime, ctx.target.runtime.new_stream()
    source, back = (runtime.pinned_buffer((SIZE,), torch.float32) for _ in range(2))
    there = torch.empty(SIZE, device=runtime.device)
    source.fill_(0)

    def slowly(_: int | None) -> None:
        time.sleep(0.02)
        source.add_(1.0)

    function = FUNCTION(slowly)
    for i in range(5):
        runtime.launch_host(stream, _address(function), 0)
        runtime.copy_async(there, source, stream)
        runtime.copy_async(back, there, stream)
        _settle(ctx, stream)
        ctx.require(bool((back == i + 1).all()), f"round {i}: a copy ran before the callback ahead of it had ended")


def _each(ctx: Context) -> None:
    _require_callbacks(ctx)
    stream, seen = ctx.target.runtime.new_stream(), []
    function = FUNCTION(lambda data: seen.append(data))
    for i in range(100):
        ctx.target.runtime.launch_host(stream, _address(function), i + 1)
    _settle(ctx, stream)
    ctx.require(seen == list(range(1, 101)), f"{len(seen)} callbacks of 100, first {seen[:5]}")


def _free(ctx: Context) -> None:
    _require_callbacks(ctx)
    if ctx.target.is_host:
        ctx.not_applicable("on a host all work is done when the call returns")
    runtime, stream, ended = ctx.target.runtime, ctx.target.runtime.new_stream(), []
    function = FUNCTION(lambda _: (time.sleep(0.05), ended.append(1))[0])  # type: ignore[func-returns-value]
    runtime.launch_host(stream, _address(function), 0)
    waited = bool(ended)
    _settle(ctx, stream)
    ctx.require(not waited, "launch_host came back only when the function had ended")


def _no_graphs(ctx: Context) -> None:
    if ctx.target.runtime.graph is not GraphMode.NONE:
        ctx.not_applicable("the runtime declares graphs")
    try:
        ctx.target.runtime.capture(ctx.target.stream, lambda: None)
    except NotImplementedError:
        return
    ctx.fail("capture works, but graphs are not declared")


def _replay(ctx: Context) -> None:
    _require_graphs(ctx)
    runtime, stream = ctx.target.runtime, ctx.target.runtime.new_stream()
    x = ctx.target.put(torch.zeros(SIZE))

    def work() -> None:
        with runtime.use_stream(stream):
            x.add_(1.0)

    graph = runtime.capture(stream, work)
    runtime.synchronize(stream)
    ctx.require(bool((ctx.target.get(x) == 0).all()), "capturing ran the work")
    for i in range(3):
        graph.replay(stream)
        runtime.synchronize(stream)
        ctx.require(
            bool((ctx.target.get(x) == i + 1).all()), f"after replay {i + 1} the sum is {float(ctx.target.get(x)[0])}"
        )


def _graph_callback(ctx: Context) -> None:
    _require_graphs(ctx)
    runtime, stream, seen = ctx.target.runtime, ctx.target.runtime.new_stream(), []
    if runtime.host_callback is not HostCallbackMode.CAPTURABLE:
        ctx.not_applicable("host callbacks are not declared capturable")
    function = FUNCTION(lambda data: seen.append(data))
    launch: Callable[[], None] = lambda: runtime.launch_host(stream, _address(function), 5)  # noqa: E731
    graph = runtime.capture(stream, launch)
    ctx.require(not seen, "capturing ran the callback")
    for i in range(4):
        graph.replay(stream)
        _settle(ctx, stream)
        ctx.require(seen == [5] * (i + 1), f"after {i + 1} replays the callback ran {len(seen)} times")
