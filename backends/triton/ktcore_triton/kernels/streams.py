"""Residual streams: what a branch reads of them, and how its result gets into them; X [T, STREAMS * hidden]."""

import triton
import triton.language as tl


@triton.jit
def connect_kernel(
    x, z, base, scale, out, carry, hidden, eps, rms_eps, rounds,
    STREAMS: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK: tl.constexpr, MIXED: tl.constexpr,
):  # fmt: skip
    """Hyper-connections, a token a program: out [T, hidden], carry [T, STREAMS * (1 + STREAMS)].

    z [T, rows]: fn X before the root mean square divides it. A carry is `post`, then M row by row.
    """
    token = tl.program_id(0).to(tl.int64)
    stream = tl.arange(0, BLOCK_S)
    real = stream < STREAMS
    row = x + token * STREAMS * hidden
    squares = tl.zeros((BLOCK,), dtype=tl.float32)
    for start in range(0, STREAMS * hidden, BLOCK):
        column = start + tl.arange(0, BLOCK)
        some = tl.load(row + column, mask=column < STREAMS * hidden, other=0.0).to(tl.float32)
        squares += some * some
    root = tl.rsqrt(tl.sum(squares, 0) / (STREAMS * hidden) + rms_eps)
    rows: tl.constexpr = STREAMS * (2 + STREAMS) if MIXED else STREAMS
    z_at = z + token * rows + stream
    own = tl.load(z_at, mask=real, other=0.0) * (root * tl.load(scale)) + tl.load(base + stream, mask=real, other=0.0)
    pre = tl.where(real, 1 / (1 + tl.exp(-own)) + eps, 0.0)
    if MIXED:
        to = carry + token * STREAMS * (1 + STREAMS)
        own = tl.load(z_at + STREAMS, mask=real, other=0.0) * (root * tl.load(scale + 1))
        own += tl.load(base + STREAMS + stream, mask=real, other=0.0)
        tl.store(to + stream, 2 / (1 + tl.exp(-own)), mask=real)
        at = 2 * STREAMS + stream[:, None] * STREAMS + stream[None, :]
        pair = real[:, None] & real[None, :]
        mix = tl.load(z + token * rows + at, mask=pair, other=0.0) * (root * tl.load(scale + 2))
        mix += tl.load(base + at, mask=pair, other=0.0)
        mix = tl.where(pair, mix, float("-inf"))
        # rows that are none have no maximum
        mix = tl.exp(mix - tl.where(real, tl.max(mix, 1), 0.0)[:, None])
        mix = tl.where(pair, mix / tl.where(real, tl.sum(mix, 1), 1.0)[:, None] + eps, 0.0)
        for turn in range(0, rounds):
            if turn > 0:
                mix = mix / tl.where(real, tl.sum(mix, 1) + eps, 1.0)[:, None]
            mix = mix / tl.where(real, tl.sum(mix, 0) + eps, 1.0)[None, :]
        tl.store(to + at - STREAMS, mix, mask=pair)
    for start in range(0, hidden, BLOCK):
        column = start + tl.arange(0, BLOCK)
        total = tl.zeros((BLOCK,), dtype=tl.float32)
        # stream by stream: on sums over an axis of four the compiler crashes for gfx1100
        for source in tl.static_range(STREAMS):
            share = tl.sum(tl.where(stream == source, pre, 0.0), 0)
            some = tl.load(row + source * hidden + column, mask=column < hidden, other=0.0).to(tl.float32)
            total += share * some
        tl.store(out + token * hidden + column, total, mask=column < hidden)


@triton.jit
def leave_kernel(
    x, y, carry, out, hidden,
    STREAMS: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK: tl.constexpr, MIXED: tl.constexpr,
):  # fmt: skip
    """Grid: (tokens, blocks of hidden). X_k = post_k y + sum_j M[j, k] X_j, or X_k + post_k y.

    carry: as `connect_kernel` writes it, or without M [T, STREAMS].
    """
    token = tl.program_id(0).to(tl.int64)
    stream = tl.arange(0, BLOCK_S)
    real = stream < STREAMS
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    there = column < hidden
    row = x + token * STREAMS * hidden + column
    weights = carry + token * (STREAMS * (1 + STREAMS) if MIXED else STREAMS)
    post = tl.load(weights + stream, mask=real, other=0.0)
    total = post[:, None] * tl.load(y + token * hidden + column, mask=there, other=0.0).to(tl.float32)[None, :]
    inside = real[:, None] & there[None, :]
    if MIXED:
        for source in tl.static_range(STREAMS):
            share = tl.load(weights + STREAMS + source * STREAMS + stream, mask=real, other=0.0)
            some = tl.load(row + source * hidden, mask=there, other=0.0).to(tl.float32)
            total += share[:, None] * some[None, :]
    else:
        total += tl.load(row[None, :] + stream[:, None] * hidden, mask=inside, other=0.0).to(tl.float32)
    to = out + token * STREAMS * hidden
    tl.store(to + stream[:, None] * hidden + column[None, :], total, mask=inside)


@triton.jit
def stream_norm_kernel(x, weight, out, hidden, eps, STREAMS: tl.constexpr, BLOCK: tl.constexpr):
    """A stream of a token a program, divided by its own root mean square, times its part of weight."""
    line = tl.program_id(0)
    column = tl.arange(0, BLOCK)
    there = column < hidden
    at = line.to(tl.int64) * hidden + column
    values = tl.load(x + at, mask=there, other=0.0).to(tl.float32)
    values = values * tl.rsqrt(tl.sum(values * values, 0) / hidden + eps)
    factor = tl.load(weight + line % STREAMS * hidden + column, mask=there, other=0.0)
    tl.store(out + at, values * factor, mask=there)


@triton.jit
def gate_kernel(normed, up, out, hidden, STREAMS: tl.constexpr, BLOCK: tl.constexpr):
    """Grid: (tokens, blocks of hidden). The mean over streams of sigmoid(up) * normed: [T, hidden]."""
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    there = column < hidden
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for stream in tl.static_range(STREAMS):
        at = (token * STREAMS + stream) * hidden + column
        gate = tl.load(up + at, mask=there, other=0.0).to(tl.float32)
        total += tl.load(normed + at, mask=there, other=0.0) / (1 + tl.exp(-gate))
    tl.store(out + token * hidden + column, total / STREAMS, mask=there)
