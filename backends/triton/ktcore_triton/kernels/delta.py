"""Gated delta net (`ktcore.ops.linear_attention`): convolution and delta rule on states in slots, all in float32.

After a causal convolution a row of `mixed` holds the queries of all key heads, then the keys, then the values of all
value heads. A state is a matrix [KEY, VALUE] a value head; a program has some of its columns.
"""

import triton
import triton.language as tl


@triton.jit
def convolution_kernel(
    x, weight, state, slots, starts, q_start, out, channels,
    WIDTH: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """silu of the depthwise convolution; x, out [T, channels], weight [WIDTH, channels], the oldest token's row first;
    state [slots, WIDTH - 1, channels]: the last inputs. Grid: (token blocks, channel blocks, sequences).

    A sequence's first block alone, which must be WIDTH - 1 tokens long or more, reads and writes its state.
    """
    sequence = tl.program_id(2)
    first = tl.load(q_start + sequence)
    tokens = tl.load(q_start + sequence + 1) - first
    begin = tl.program_id(0) * BLOCK_T
    if begin < tokens:
        oldest = tl.where(tl.load(starts + sequence) == 0, 1 - WIDTH, 0)
        held = state + tl.load(slots + sequence).to(tl.int64) * (WIDTH - 1) * channels
        channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
        inside = (channel < channels)[None, :]
        token = begin + tl.arange(0, BLOCK_T)
        there = token < tokens
        total = tl.zeros((BLOCK_T, BLOCK_C), dtype=tl.float32)
        for tap in tl.static_range(WIDTH):
            at = token + (tap - WIDTH + 1)
            now = tl.load(x + (first + at).to(tl.int64)[:, None] * channels + channel[None, :],
                          mask=(there & (at >= 0))[:, None] & inside, other=0.0)  # fmt: skip
            before = tl.load(held + (at + WIDTH - 1)[:, None] * channels + channel[None, :],
                             mask=(there & (at < 0) & (at >= oldest))[:, None] & inside, other=0.0)  # fmt: skip
            factor = tl.load(weight + tap * channels + channel, mask=channel < channels, other=0.0)
            total += (now + before) * factor[None, :]
        total = total / (1 + tl.exp(-total))
        tl.store(out + (first + token).to(tl.int64)[:, None] * channels + channel[None, :], total,
                 mask=there[:, None] & inside)  # fmt: skip
        if begin == 0:
            row = tl.arange(0, BLOCK_W)
            last = tokens - (WIDTH - 1) + row
            kept = row < WIDTH - 1
            new = tl.load(x + (first + last).to(tl.int64)[:, None] * channels + channel[None, :],
                          mask=(kept & (last >= 0))[:, None] & inside, other=0.0)  # fmt: skip
            kept_on = tl.load(held + (last + WIDTH - 1)[:, None] * channels + channel[None, :],
                             mask=(kept & (last < 0) & (last >= oldest))[:, None] & inside, other=0.0)  # fmt: skip
            # other threads may still read what is overwritten here
            tl.debug_barrier()
            tl.store(held + row[:, None] * channels + channel[None, :], new + kept_on, mask=kept[:, None] & inside)


@triton.jit
def softplus(x):
    """log(1 + e^x), exact for small e^x too: it is a rate, which adds up over many tokens."""
    y = tl.exp(-tl.abs(x))
    small = y * (1 - y * (0.5 - y * (0.3333333333 - y * 0.25)))
    return tl.maximum(x, 0.0) + tl.where(y < 0.01, small, tl.log(1 + y))


@triton.jit
def recurrence_kernel(
    mixed, a, b, decay, dt_bias, state, slots, starts, q_start, out, key_heads, value_heads, repeat, scale, eps, most,
    KEY: tl.constexpr, VALUE: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Token by token, for sequences of at most `most` new tokens. Grid: (value blocks, value heads, sequences).

    a, b [T, value_heads] before softplus and sigmoid; state [slots, value_heads, KEY, VALUE]; out [T, value_heads,
    VALUE].
    """
    sequence = tl.program_id(2)
    first = tl.load(q_start + sequence)
    last = tl.load(q_start + sequence + 1)
    if last - first <= most:
        head = tl.program_id(1)
        key_head = head // repeat % key_heads
        channels = 2 * key_heads * KEY + value_heads * VALUE
        k_at = tl.arange(0, BLOCK_K)
        v_at = tl.program_id(0) * BLOCK_V + tl.arange(0, BLOCK_V)
        k_in, v_in = k_at < KEY, v_at < VALUE
        block = k_in[:, None] & v_in[None, :]
        slot = tl.load(slots + sequence).to(tl.int64)
        place = state + ((slot * value_heads + head) * KEY + k_at[:, None]) * VALUE + v_at[None, :]
        held = tl.where(tl.load(starts + sequence) == 0, KEY, 0)
        s = tl.load(place, mask=block & (k_at < held)[:, None], other=0.0)
        rate = tl.load(decay + head)
        shift = tl.load(dt_bias + head)
        for index in range(0, last - first):
            token = (first + index).to(tl.int64)
            row = mixed + token * channels
            q = tl.load(row + key_head * KEY + k_at, mask=k_in, other=0.0)
            k = tl.load(row + (key_heads + key_head) * KEY + k_at, mask=k_in, other=0.0)
            v = tl.load(row + 2 * key_heads * KEY + head * VALUE + v_at, mask=v_in, other=0.0)
            q = q * (tl.rsqrt(tl.sum(q * q, 0) + eps) * scale)
            k = k * tl.rsqrt(tl.sum(k * k, 0) + eps)
            at = token * value_heads + head
            beta = 1 / (1 + tl.exp(-tl.load(b + at)))
            s = s * tl.exp(rate * softplus(tl.load(a + at) + shift))
            u = beta * (v - tl.sum(s * k[:, None], 0))
            s += k[:, None] * u[None, :]
            tl.store(out + at * VALUE + v_at, tl.sum(s * q[:, None], 0), mask=v_in)
        tl.store(place, s, mask=block)


@triton.jit
def unit_lower_inverse(low, SIZE: tl.constexpr):
    """(I + low)^-1 of a strictly lower triangular [SIZE, SIZE]: inverses of diagonal blocks, put together two by two.

    ((A, 0), (E, B))^-1 = ((A', 0), (-B' E A', B')), so with T = diag(A', B') it is T - T E T.
    """
    i = tl.arange(0, SIZE)[:, None]
    j = tl.arange(0, SIZE)[None, :]
    found = tl.where(i == j, 1.0, tl.where((i // 2 == j // 2) & (i > j), -low, 0.0))
    LEVELS: tl.constexpr = 4 if SIZE == 16 else (5 if SIZE == 32 else 6)
    for level in tl.static_range(1, LEVELS):
        half = 2**level
        corner = tl.where((i // (2 * half) == j // (2 * half)) & (i // half > j // half), low, 0.0)
        product = tl.dot(found, corner, input_precision="ieee")
        found -= tl.dot(product, found, input_precision="ieee")
    return found


@triton.jit
def chunks_kernel(
    mixed, a, b, decay, dt_bias, state, slots, starts, q_start, out, key_heads, value_heads, repeat, scale, eps, most,
    KEY: tl.constexpr, VALUE: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """The same by matrix products over chunks of tokens, for sequences of more than `most`; grid and arguments too.

    With G the running sums of g = decay * softplus(a + dt_bias) in a chunk, L_tj = beta_t e^(G_t - G_j) k_t.k_j below
    the diagonal and S the state before: U = (I + L)^-1 beta (V - e^G K S), out = e^G Q S + (Q K^T * e^(G_t - G_j)) U
    (`delta_rule_chunked`). The state stays in memory, and BLOCK_K of its rows are in registers at a time: all of them,
    with the keys, would not fit.
    """
    sequence = tl.program_id(2)
    first = tl.load(q_start + sequence)
    tokens = tl.load(q_start + sequence + 1) - first
    if tokens > most:
        head = tl.program_id(1)
        key_head = head // repeat % key_heads
        channels = 2 * key_heads * KEY + value_heads * VALUE
        k_at = tl.arange(0, BLOCK_K)
        v_at = tl.program_id(0) * BLOCK_V + tl.arange(0, BLOCK_V)
        v_in = v_at < VALUE
        slot = tl.load(slots + sequence).to(tl.int64)
        place = state + (slot * value_heads + head) * KEY * VALUE + k_at[:, None] * VALUE + v_at[None, :]
        held = tl.where(tl.load(starts + sequence) == 0, KEY, 0)
        rate = tl.load(decay + head)
        shift = tl.load(dt_bias + head)
        row = tl.arange(0, CHUNK)
        below = row[:, None] > row[None, :]
        same = row[:, None] == row[None, :]
        for begin in range(0, tokens, CHUNK):
            token = begin + row
            there = token < tokens
            token = (first + token).to(tl.int64)
            rows = mixed + token[:, None] * channels
            queries = rows + key_head * KEY + k_at[None, :]
            keys = queries + key_heads * KEY
            likeness = tl.zeros((CHUNK, CHUNK), dtype=tl.float32)
            weights = tl.zeros((CHUNK, CHUNK), dtype=tl.float32)
            seen = tl.zeros((CHUNK, BLOCK_V), dtype=tl.float32)
            y = tl.zeros((CHUNK, BLOCK_V), dtype=tl.float32)
            length = tl.zeros((CHUNK,), dtype=tl.float32)
            for part in range(0, KEY, BLOCK_K):
                some = there[:, None] & (part + k_at < KEY)[None, :]
                q = tl.load(queries + part, mask=some, other=0.0)
                k = tl.load(keys + part, mask=some, other=0.0)
                s = tl.load(place + part * VALUE, mask=(part + k_at < held)[:, None] & v_in[None, :], other=0.0)
                length += tl.sum(q * q, 1)
                likeness = tl.dot(k, tl.trans(k), likeness, input_precision="ieee")
                weights = tl.dot(q, tl.trans(k), weights, input_precision="ieee")
                seen = tl.dot(k, s, seen, input_precision="ieee")
                y = tl.dot(q, s, y, input_precision="ieee")
            k_unit = tl.rsqrt(tl.sum(tl.where(same, likeness, 0.0), 1) + eps)
            q_unit = tl.rsqrt(length + eps) * scale
            at = token * value_heads + head
            beta = tl.where(there, 1 / (1 + tl.exp(-tl.load(b + at, mask=there, other=0.0))), 0.0)
            g = tl.where(there, rate * softplus(tl.load(a + at, mask=there, other=0.0) + shift), 0.0)
            grown = tl.exp(tl.cumsum(g, 0))
            # sums of g over j < i <= t as such: differences of running sums would lose their digits
            upto = tl.where(row[:, None] >= row[None, :], g[None, :], 0.0)
            between = tl.dot(upto, tl.where(below, 1.0, 0.0), input_precision="ieee")
            fade = tl.exp(between) * k_unit[None, :]
            solve = unit_lower_inverse(tl.where(below, (beta * k_unit)[:, None] * likeness * fade, 0.0), CHUNK)
            v = tl.load(rows + 2 * key_heads * KEY + head * VALUE + v_at[None, :],
                        mask=there[:, None] & v_in[None, :], other=0.0)  # fmt: skip
            u = beta[:, None] * (v - (grown * k_unit)[:, None] * seen)
            u = tl.dot(solve, u, input_precision="ieee")
            weights = tl.where(below | same, weights * fade, 0.0)
            y = tl.dot(weights, u, grown[:, None] * y, input_precision="ieee") * q_unit[:, None]
            tl.store(out + at[:, None] * VALUE + v_at[None, :], y, mask=there[:, None] & v_in[None, :])
            after = tl.sum(tl.where(row[:, None] == CHUNK - 1, between, 0.0), 0)
            u = u * (tl.exp(after) * k_unit)[:, None]
            shrink = tl.exp(tl.sum(g, 0))
            for part in range(0, KEY, BLOCK_K):
                some = there[:, None] & (part + k_at < KEY)[None, :]
                k = tl.load(keys + part, mask=some, other=0.0)
                s = tl.load(place + part * VALUE, mask=(part + k_at < held)[:, None] & v_in[None, :], other=0.0)
                s = tl.dot(tl.trans(k), u, s * shrink, input_precision="ieee")
                tl.store(place + part * VALUE, s, mask=(part + k_at < KEY)[:, None] & v_in[None, :])
            held = KEY
            # what one thread has stored, others load
            tl.debug_barrier()
