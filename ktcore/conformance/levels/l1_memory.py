"""Memory: figures that are true, allocations that come back, errors instead of crashes."""

from __future__ import annotations

import ctypes
import gc
import os

import psutil
import torch

from ktcore.conformance.case import Case, Check, Context

MIB = 1 << 20
BLOCK = 4 * MIB
ROUNDS = 48
ALLOWED = 64 * MIB


def cases() -> list[Case]:
    """Memory."""
    return [
        _case("figures", "free and total are believable", _figures),
        _case("figures-follow", "free memory falls by what is allocated", _follow),
        _case("device-leak", "tensors that are dropped come back", _device_leak),
        _case("pinned-leak", "pinned buffers that are dropped come back", _pinned_leak),
        _case("stream-leak", "streams and events that are dropped come back", _stream_leak),
        _case("out-of-memory", "too much is an error, and the device works afterwards", _too_much),
        _case("use-after-free", "work on memory that was given back is an error", _after_free),
    ]


def _case(name: str, about: str, run: Check) -> Case:
    return Case(f"L1.memory.{name}", 1, "memory", about, run)


def resident() -> int:
    """Bytes of this process in memory, without what its heap holds free: a leak could grow into that unseen."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if os.name == "posix" else None
    if trim is not None:  # glibc has it, other C libraries do not
        trim(0)
    return int(psutil.Process().memory_info().rss)


def grown(ctx: Context) -> int:
    """What is in use now: device memory for an accelerator, the process's for a host."""
    if ctx.target.is_host:
        return resident()
    gc.collect()
    ctx.target.runtime.synchronize()
    info = ctx.target.runtime.memory()
    return info.total - info.free


def _figures(ctx: Context) -> None:
    info = ctx.target.runtime.memory()
    ctx.require(0 < info.free <= info.total, f"free {info.free} of total {info.total} bytes")
    declared = ctx.target.device.memory_bytes
    if declared is not None:
        off = abs(declared - info.total) / info.total
        ctx.require(off < 0.05, f"the device reports {info.total} bytes, its capabilities {declared}")


def _follow(ctx: Context) -> None:
    if ctx.target.is_host:
        ctx.not_applicable("host memory is shared with every process")
    before = grown(ctx)
    held = [torch.empty(BLOCK, dtype=torch.uint8, device=ctx.target.runtime.device) for _ in range(8)]
    used = grown(ctx) - before
    ctx.require(used >= 0.9 * 8 * BLOCK, f"{8 * BLOCK} bytes were allocated, free memory fell by {used}")
    held.clear()


def _leak(ctx: Context, make: object, measure: object = None) -> None:
    count = measure or (lambda: grown(ctx))
    for _ in range(4):
        make()  # type: ignore[operator]
    before = count()  # type: ignore[operator]
    for _ in range(ROUNDS):
        make()  # type: ignore[operator]
    kept = count() - before  # type: ignore[operator]
    ctx.require(kept < ALLOWED, f"{kept // MIB} MiB stay in use after {ROUNDS} rounds of {BLOCK // MIB} MiB")


def _device_leak(ctx: Context) -> None:
    def make() -> None:
        x = torch.empty(BLOCK, dtype=torch.uint8, device=ctx.target.runtime.device)
        with ctx.target.runtime.use_stream(ctx.target.stream):
            x.fill_(1)
        ctx.target.runtime.synchronize(ctx.target.stream)

    _leak(ctx, make)


def _pinned_leak(ctx: Context) -> None:
    _leak(ctx, lambda: ctx.target.runtime.pinned_buffer((BLOCK,), torch.uint8).fill_(1), resident)


def _stream_leak(ctx: Context) -> None:
    runtime = ctx.target.runtime

    def make() -> None:
        stream = runtime.new_stream()
        for _ in range(20):
            runtime.record_event(stream)
        runtime.synchronize(stream)

    _leak(ctx, make)


def _too_much(ctx: Context) -> None:
    if ctx.target.is_host:
        ctx.not_applicable("hosts promise more memory than they have")
    total = ctx.target.runtime.memory().total
    try:
        torch.empty(2 * total, dtype=torch.uint8, device=ctx.target.runtime.device)
    except (RuntimeError, MemoryError):
        ctx.require(bool((ctx.target.get(ctx.target.put(torch.ones(8))) == 1).all()), "the device is broken afterwards")
        return
    ctx.fail(f"{2 * total} bytes were given of {total}")


def _after_free(ctx: Context) -> None:
    if not ctx.target.expectations.freed_access_is_an_error:
        ctx.not_applicable("the device does not say that it notices")
    runtime = ctx.target.runtime
    stream, source = runtime.new_stream(), runtime.pinned_buffer((BLOCK // 4,), torch.float32)
    for _ in range(ROUNDS):
        # made on another stream, given back while its copies are still to come
        x = torch.empty(BLOCK // 4, device=runtime.device)
        for _ in range(8):
            runtime.copy_async(x, source, stream)
        del x
        try:
            runtime.synchronize(stream)
        except RuntimeError:
            return
    ctx.fail(f"memory was given back under its copies {ROUNDS} times, and no error came")
