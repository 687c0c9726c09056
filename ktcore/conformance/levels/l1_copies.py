"""Device basics: tensors, pinned buffers, copies in both directions."""

from __future__ import annotations

from functools import partial

import torch

from ktcore.conformance.case import Case, Check, Context

DTYPES = ("float32", "float16", "bfloat16", "int64", "int32", "uint8", "bool")
SIZES = ((1,), (3,), (7, 5), (4097,), (1 << 20,))


def cases() -> list[Case]:
    """Copies."""
    return [
        *(_case(f"there-and-back.{d}", "bits come back as they went", partial(_round_trip, d)) for d in DTYPES),
        _case("sizes", "one value, odd sizes, megabytes", _sizes),
        _case("slices", "into and out of the middle of a tensor", _slices),
        _case("order", "of two copies to one place the later one stays", _order),
        _case("pinned-buffers-are-apart", "buffers are host memory of the asked shape and share nothing", _pinned),
        _case("two-runtimes", "a device can be opened twice, and one can be closed", _two),
        _case("device", "tensors of the device know it", _device),
    ]


def _case(name: str, about: str, run: Check) -> Case:
    return Case(f"L1.copy.{name}", 1, "copy", about, run)


def random_of(ctx: Context, shape: tuple[int, ...], dtype: torch.dtype, what: str = "") -> torch.Tensor:
    """Random values of any dtype."""
    drawn = torch.from_numpy(ctx.rng(what).integers(0, 200, shape))
    return (drawn % 2).bool() if dtype is torch.bool else drawn.to(dtype)


def there_and_back(ctx: Context, values: torch.Tensor) -> torch.Tensor:
    """Through the device by the runtime's own copies, also where it is the host."""
    runtime, stream = ctx.target.runtime, ctx.target.stream
    out = runtime.pinned_buffer(tuple(values.shape), values.dtype)
    out.copy_(values)
    there = torch.empty(values.shape, dtype=values.dtype, device=runtime.device)
    back = runtime.pinned_buffer(tuple(values.shape), values.dtype)
    runtime.copy_async(there, out, stream)
    runtime.copy_async(back, there, stream)
    runtime.synchronize(stream)
    return back.clone()


def _round_trip(name: str, ctx: Context) -> None:
    values = random_of(ctx, (257,), getattr(torch, name))
    ctx.require(torch.equal(there_and_back(ctx, values), values), f"{name} values changed on the way")


def _sizes(ctx: Context) -> None:
    for shape in SIZES:
        values = random_of(ctx, shape, torch.float32, str(shape))
        ctx.require(torch.equal(there_and_back(ctx, values), values), f"{list(shape)} values changed on the way")


def _slices(ctx: Context) -> None:
    runtime, stream = ctx.target.runtime, ctx.target.stream
    values = random_of(ctx, (100,), torch.float32)
    there = ctx.target.put(torch.full((300,), -1.0))
    staged = runtime.pinned_buffer((100,), torch.float32)
    staged.copy_(values)
    runtime.copy_async(there[100:200], staged, stream)
    runtime.synchronize(stream)
    got = ctx.target.get(there)
    ctx.require(torch.equal(got[100:200], values), "the middle did not arrive")
    ctx.require(bool((got[:100] == -1).all() and (got[200:] == -1).all()), "the copy wrote beside its destination")


def _order(ctx: Context) -> None:
    runtime, stream = ctx.target.runtime, ctx.target.stream
    there = torch.empty(1 << 16, device=runtime.device)
    back = runtime.pinned_buffer((1 << 16,), torch.float32)
    sources = [runtime.pinned_buffer((1 << 16,), torch.float32).fill_(i) for i in range(8)]
    for source in sources:
        runtime.copy_async(there, source, stream)
    runtime.copy_async(back, there, stream)
    runtime.synchronize(stream)
    ctx.require(bool((back == 7).all()), f"the last copy wrote 7, the tensor holds {float(back[0])}")


def _pinned(ctx: Context) -> None:
    buffers = [ctx.target.runtime.pinned_buffer((33, 5), torch.float16) for _ in range(6)]
    for i, buffer in enumerate(buffers):
        good = buffer.device.type == "cpu" and buffer.dtype is torch.float16 and buffer.shape == (33, 5)
        ctx.require(good, f"asked for float16 [33, 5] on the host, got {buffer.dtype} {list(buffer.shape)}")
        ctx.require(buffer.is_contiguous(), "the buffer is not contiguous")
        buffer.fill_(i)
    ctx.require(all(bool((b == i).all()) for i, b in enumerate(buffers)), "two buffers share memory")


def _two(ctx: Context) -> None:
    second = ctx.target.registry.runtime(f"{ctx.target.name}:{ctx.target.index}")
    ctx.require(second.device == ctx.target.runtime.device, "the same device has two torch devices")
    second.close()
    values = random_of(ctx, (64,), torch.float32)
    ctx.require(torch.equal(there_and_back(ctx, values), values), "closing one runtime breaks the other")


def _device(ctx: Context) -> None:
    runtime = ctx.target.runtime
    ctx.require(torch.empty(3, device=runtime.device).device.type == runtime.device.type, "tensors are elsewhere")
    live = runtime.capabilities()
    ctx.require(live.backend == ctx.target.name, f"the device says it belongs to '{live.backend}'")
    ctx.require(live.live, "an open device's capabilities are not marked live")
    spec = ctx.target.registry.known(ctx.target.name).spec
    assert spec is not None
    ctx.require(bool(live.name), "the device has no name")
