"""Streams and events: order within a stream, order across streams, and the host's view of both."""

from __future__ import annotations

import time

import torch

from ktcore.conformance.case import Case, Check, Context

STREAMS = 16
ROUNDS = 30
SIZE = 1 << 16
PATIENCE = 20.0


def cases() -> list[Case]:
    """Order is what streams are for."""
    return [
        _case("order", "operations of one stream run in order", _order),
        _case("order-with-copies", "operations and copies of one stream keep their order", _mixed),
        _case("many", "sixteen streams at once do not disturb each other", _many),
        _case("wait-event", "a stream that waits for an event sees what came before it", _wait),
        _case("wait-event-both-ways", "two streams take turns", _turns),
        _case("event-done", "an event that is done has its work done", _done),
        _case("event-marks-its-place", "an event does not wait for what comes after it", _place),
        _case("synchronize-stream", "after it the stream's work is done", _synchronize_stream),
        _case("synchronize-event", "after it the work before the event is done", _synchronize_event),
        _case("late-error", "work that fails on the device is an error on the host at the next wait", _late),
        _case("synchronize-device", "after it all streams' work is done", _synchronize_device),
    ]


def _case(name: str, about: str, run: Check) -> Case:
    return Case(f"L1.stream.{name}", 1, "stream", about, run)


def _expected(steps: int) -> float:
    value = 1.0
    for _ in range(steps):
        value = value * 0.5 + 1.0
    return value


def _advance(ctx: Context, stream: object, x: torch.Tensor, steps: int = 1) -> None:
    with ctx.target.runtime.use_stream(stream):
        for _ in range(steps):
            x.mul_(0.5).add_(1.0)


def _is(got: torch.Tensor, value: float) -> bool:
    return bool((got - value).abs().max() < 1e-5)


def _order(ctx: Context) -> None:
    x = ctx.target.put(torch.ones(SIZE))
    _advance(ctx, ctx.target.stream, x, 10)
    ctx.require(_is(ctx.target.get(x), _expected(10)), "ten operations in a row gave another result than one by one")


def _mixed(ctx: Context) -> None:
    runtime, stream = ctx.target.runtime, ctx.target.runtime.new_stream()
    source, back = (runtime.pinned_buffer((SIZE,), torch.float32) for _ in range(2))
    with runtime.use_stream(stream):
        there = torch.empty(SIZE, device=runtime.device)
    for i in range(ROUNDS):
        source.fill_(float(i))
        runtime.copy_async(there, source, stream)
        _advance(ctx, stream, there)
        runtime.copy_async(back, there, stream)
        runtime.synchronize(stream)
        ctx.require(_is(back, 0.5 * i + 1.0), f"round {i}: {i} / 2 + 1 came back as {float(back[0])}")


def _many(ctx: Context) -> None:
    runtime = ctx.target.runtime
    streams = [runtime.new_stream() for _ in range(STREAMS)]
    tensors = [ctx.target.put(torch.ones(1000 + i)) for i in range(STREAMS)]
    for _ in range(5):
        for stream, x in zip(streams, tensors, strict=True):
            _advance(ctx, stream, x)
    for stream in streams:
        runtime.synchronize(stream)
    for i, x in enumerate(tensors):
        ctx.require(_is(ctx.target.get(x), _expected(5)), f"stream {i} of {STREAMS} gave a wrong result")


def _wait(ctx: Context) -> None:
    runtime = ctx.target.runtime
    first, second = runtime.new_stream(), runtime.new_stream()
    source, back = (runtime.pinned_buffer((SIZE,), torch.float32) for _ in range(2))
    there = torch.empty(SIZE, device=runtime.device)
    for i in range(ROUNDS):
        source.fill_(float(i))
        runtime.copy_async(there, source, first)
        runtime.wait_event(second, runtime.record_event(first))
        runtime.copy_async(back, there, second)
        runtime.synchronize(second)
        ctx.require(
            bool((back == i).all()), f"round {i}: the second stream read {float(back[0])} before {i} was written"
        )


def _turns(ctx: Context) -> None:
    runtime = ctx.target.runtime
    streams = [runtime.new_stream(), runtime.new_stream()]
    x = ctx.target.put(torch.ones(SIZE))
    for i in range(ROUNDS):
        _advance(ctx, streams[i % 2], x)
        runtime.wait_event(streams[(i + 1) % 2], runtime.record_event(streams[i % 2]))
    for stream in streams:
        runtime.synchronize(stream)
    ctx.require(_is(ctx.target.get(x), _expected(ROUNDS)), "two streams that wait for each other lost an operation")


def _done(ctx: Context) -> None:
    runtime, stream = ctx.target.runtime, ctx.target.runtime.new_stream()
    source, back = (runtime.pinned_buffer((SIZE,), torch.float32) for _ in range(2))
    there = torch.empty(SIZE, device=runtime.device)
    for i in range(ROUNDS):
        source.fill_(float(i))
        runtime.copy_async(there, source, stream)
        runtime.copy_async(back, there, stream)
        event, limit = runtime.record_event(stream), time.monotonic() + PATIENCE
        while not runtime.event_done(event):
            ctx.require(time.monotonic() < limit, f"an event was not done after {PATIENCE:g} s")
            time.sleep(0)
        ctx.require(bool((back == i).all()), f"round {i}: the event was done, but the copy before it was not")


def _place(ctx: Context) -> None:
    runtime, stream = ctx.target.runtime, ctx.target.runtime.new_stream()
    event = runtime.record_event(stream)
    runtime.synchronize(event)
    x = ctx.target.put(torch.ones(SIZE))
    _advance(ctx, stream, x, 5)
    ctx.require(runtime.event_done(event), "an event that had passed is open again after later work")
    runtime.synchronize(stream)


def _synchronize_stream(ctx: Context) -> None:
    runtime = ctx.target.runtime
    stream = runtime.new_stream()
    _copied(ctx, stream, lambda: runtime.synchronize(stream))


def _synchronize_event(ctx: Context) -> None:
    runtime = ctx.target.runtime
    stream = runtime.new_stream()
    _copied(ctx, stream, lambda: runtime.synchronize(runtime.record_event(stream)))


def _synchronize_device(ctx: Context) -> None:
    _copied(ctx, ctx.target.runtime.new_stream(), ctx.target.runtime.synchronize)


def _late(ctx: Context) -> None:
    fail = ctx.target.expectations.fail_late
    if fail is None:
        ctx.not_applicable("the device has no way to make work fail")
    runtime, stream = ctx.target.runtime, ctx.target.runtime.new_stream()
    fail(runtime, stream)
    try:
        runtime.synchronize(stream)
    except Exception:
        return
    ctx.fail("work failed on the device, and the host waited for it without an error")


def _copied(ctx: Context, stream: object, wait: object) -> None:
    runtime = ctx.target.runtime
    source, back = (runtime.pinned_buffer((SIZE,), torch.float32) for _ in range(2))
    there = torch.empty(SIZE, device=runtime.device)
    for i in range(ROUNDS):
        source.fill_(float(i))
        runtime.copy_async(there, source, stream)
        runtime.copy_async(back, there, stream)
        wait()  # type: ignore[operator]
        ctx.require(bool((back == i).all()), f"round {i}: the host waited, and the copy was not done")
