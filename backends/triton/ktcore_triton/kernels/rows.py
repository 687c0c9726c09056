"""Kernels that read and write rows: RMSNorm with a residual, RoPE, gated activations, writes into a paged cache."""

import triton
import triton.language as tl


@triton.jit
def rms_norm_kernel(
    x, residual, weight, out, total_out, dim, eps, weight_offset,
    BLOCK: tl.constexpr, HAS_RESIDUAL: tl.constexpr, HAS_WEIGHT: tl.constexpr,
):  # fmt: skip
    """One row of `dim` values a program: s = x + residual; out = s / sqrt(mean(s^2) + eps) * (weight + offset)."""
    start = tl.program_id(0).to(tl.int64) * dim
    column = tl.arange(0, BLOCK)
    there = column < dim
    values = tl.load(x + start + column, mask=there, other=0.0).to(tl.float32)
    if HAS_RESIDUAL:
        values += tl.load(residual + start + column, mask=there, other=0.0).to(tl.float32)
        tl.store(total_out + start + column, values.to(total_out.dtype.element_ty), mask=there)
    values = values * tl.rsqrt(tl.sum(values * values, 0) / dim + eps)
    if HAS_WEIGHT:
        values *= tl.load(weight + column, mask=there, other=0.0).to(tl.float32) + weight_offset
    tl.store(out + start + column, values.to(out.dtype.element_ty), mask=there)


@triton.jit
def rope_kernel(
    x, positions, frequencies, out, heads, width, pairs, factor,
    BLOCK: tl.constexpr, REST: tl.constexpr, INTERLEAVED: tl.constexpr, HAS_REST: tl.constexpr,
):  # fmt: skip
    """One head of a token a program: its first 2 * pairs values rotate, the rest is copied."""
    token = tl.program_id(0) // heads
    start = tl.program_id(0).to(tl.int64) * width
    pair = tl.arange(0, BLOCK)
    there = pair < pairs
    angle = tl.load(positions + token).to(tl.float32) * tl.load(frequencies + pair, mask=there, other=0.0)
    cos, sin = tl.cos(angle) * factor, tl.sin(angle) * factor
    if INTERLEAVED:
        first, second = 2 * pair, 2 * pair + 1
    else:
        first, second = pair, pair + pairs
    a = tl.load(x + start + first, mask=there, other=0.0).to(tl.float32)
    b = tl.load(x + start + second, mask=there, other=0.0).to(tl.float32)
    tl.store(out + start + first, (a * cos - b * sin).to(out.dtype.element_ty), mask=there)
    tl.store(out + start + second, (b * cos + a * sin).to(out.dtype.element_ty), mask=there)
    if HAS_REST:
        column = 2 * pairs + tl.arange(0, REST)
        kept = tl.load(x + start + column, mask=column < width, other=0.0)
        tl.store(out + start + column, kept, mask=column < width)


@triton.jit
def swiglu_kernel(gate, up, out, count, BLOCK: tl.constexpr):
    """silu(gate) * up, elementwise."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    g = tl.load(gate + at, mask=at < count, other=0.0).to(tl.float32)
    u = tl.load(up + at, mask=at < count, other=0.0).to(tl.float32)
    tl.store(out + at, (g / (1 + tl.exp(-g)) * u).to(out.dtype.element_ty), mask=at < count)


@triton.jit
def cache_write_kernel(rows, slots, cache, width, stride, column, BLOCK: tl.constexpr):
    """Row i of `rows` goes to row slots[i] of a cache whose rows are `stride` apart, from `column` on; -1 skips it."""
    slot = tl.load(slots + tl.program_id(0)).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    values = tl.load(rows + tl.program_id(0).to(tl.int64) * width + at, mask=at < width, other=0.0).to(tl.float32)
    target = cache + slot * stride + column + at
    tl.store(target, values.to(cache.dtype.element_ty), mask=at < tl.where(slot >= 0, width, 0))
