"""Indexers of sparse attention: scores of cached keys, the choice of the best of them, and keys of whole pools.

A row of keys is a token's, or that of a pool: POOL tokens in a row. Contexts are counted in rows by dividing.
"""

import triton
import triton.language as tl


@triton.jit
def scores_kernel(
    q, weights, keys, out, q_start, context_lens, table, first, last, table_stride, page_rows, out_stride, pool, few,
    HEADS: tl.constexpr, DIM: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr,
    QUERIES: tl.constexpr, WEIGHED: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """Grid: (blocks of keys, blocks of queries, sequences). sum over heads of weight * relu(q . key), in float32.

    q [T, HEADS, DIM], weights [T, HEADS], keys [slots, DIM]; out [last - first, out_stride], of tokens from `first` to
    `last`. A program multiplies its keys with QUERIES tokens, one by one, all heads at once. What no query sees is left
    out, and sequences that have no more than `few` rows, of which all are chosen whatever they score.
    """
    sequence = tl.program_id(2)
    begun = tl.load(q_start + sequence)
    queries = tl.load(q_start + sequence + 1) - begun
    before = tl.load(context_lens + sequence) - queries
    least = tl.maximum(tl.program_id(1) * QUERIES, first - begun)
    most = tl.minimum(tl.minimum((tl.program_id(1) + 1) * QUERIES, queries), last - begun)
    start = tl.program_id(0) * BLOCK_N
    rows = (before + most) // pool
    if (least < most) & (start < rows) & (rows > few):
        at = start + tl.arange(0, BLOCK_N)
        there = at < rows
        page = tl.load(table + sequence.to(tl.int64) * table_stride + at // page_rows, mask=there, other=0)
        slot = page.to(tl.int64) * page_rows + at % page_rows
        column = tl.arange(0, BLOCK_D)
        k = tl.load(keys + slot[:, None] * DIM + column[None, :], mask=there[:, None] & (column < DIM)[None, :],
                    other=0.0).to(COMPUTE)  # fmt: skip
        head = tl.arange(0, BLOCK_H)
        inside = (head < HEADS)[:, None] & (column < DIM)[None, :]
        for query in range(least, most):
            token = (begun + query).to(tl.int64)
            own = tl.load(q + (token * HEADS + head)[:, None] * DIM + column[None, :], mask=inside, other=0.0)
            each = tl.maximum(tl.dot(own.to(COMPUTE), tl.trans(k), input_precision="ieee"), 0.0)
            if WEIGHED:
                each *= tl.load(weights + token * HEADS + head, mask=head < HEADS, other=0.0)[:, None]
            tl.store(out + (token - first) * out_stride + at, tl.sum(each, 0), mask=there)


@triton.jit
def best_kernel(
    q, keys, out, q_start, context_lens, table, first, last, table_stride, page_size, out_stride, few,
    HEADS: tl.constexpr, DIM: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr,
    POOL: tl.constexpr, QUERIES: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """Grid: (pools, blocks of queries, sequences). The largest q . key of a pool's tokens that a query sees, by head.

    out [(last - first) * HEADS, out_stride]; all else as in `scores_kernel`, but keys are those of tokens.
    """
    sequence = tl.program_id(2)
    begun = tl.load(q_start + sequence)
    queries = tl.load(q_start + sequence + 1) - begun
    before = tl.load(context_lens + sequence) - queries
    least = tl.maximum(tl.program_id(1) * QUERIES, first - begun)
    most = tl.minimum(tl.minimum((tl.program_id(1) + 1) * QUERIES, queries), last - begun)
    start = tl.program_id(0) * POOL
    if (least < most) & (start < before + most) & ((before + most - 1) // POOL >= few):
        part = tl.arange(0, BLOCK_N)
        at = start + part
        there = (part < POOL) & (at < before + most)
        page = tl.load(table + sequence.to(tl.int64) * table_stride + at // page_size, mask=there, other=0)
        slot = page.to(tl.int64) * page_size + at % page_size
        column = tl.arange(0, BLOCK_D)
        k = tl.load(keys + slot[:, None] * DIM + column[None, :], mask=there[:, None] & (column < DIM)[None, :],
                    other=0.0).to(COMPUTE)  # fmt: skip
        head = tl.arange(0, BLOCK_H)
        inside = (head < HEADS)[:, None] & (column < DIM)[None, :]
        for query in range(least, most):
            token = (begun + query).to(tl.int64)
            own = tl.load(q + (token * HEADS + head)[:, None] * DIM + column[None, :], mask=inside, other=0.0)
            each = tl.dot(own.to(COMPUTE), tl.trans(k), input_precision="ieee")
            each = tl.where((there & (at <= before + query))[None, :], each, float("-inf"))
            line = ((token - first) * HEADS + head) * out_stride
            tl.store(out + line + tl.program_id(0), tl.max(each, 1), mask=head < HEADS)


@triton.jit
def rising(score):
    """int32 in the order of float32; both zeros are one."""
    bits = tl.where(score == 0, 0.0, score).to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def choose_kernel(
    scores, positions, out, first, stride, top, width, local,
    ROWS: tl.constexpr, POOL: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK: tl.constexpr, TAIL: tl.constexpr,
):  # fmt: skip
    """Grid: (rows of scores). The tokens of the `top` rows with the highest scores, rising, then -1: int32 [width].

    scores [tokens * ROWS, stride], those of token `first` first. A query sees the rows that end up to it, and with TAIL
    all tokens behind them are chosen too; without TAIL those that begin up to it, of which the last `local` are always
    chosen. The least score that is chosen is found by its bits, eight at a time; of equal ones the first are chosen.
    """
    line = tl.program_id(0)
    token = line // ROWS
    position = tl.load(positions + first + token).to(tl.int32)
    reach = (position + 1) // POOL if TAIL else position // POOL + 1
    row = scores + line.to(tl.int64) * stride
    to = out + (first * ROWS + line).to(tl.int64) * width
    # where all are chosen, whatever they score: nothing is read
    least = -2147483648
    wanted = tl.minimum(reach, top)
    if reach > top:
        digit = tl.arange(0, 256)
        least = 0
        for level in tl.static_range(4):
            counts = tl.zeros((256,), dtype=tl.int32)
            for start in range(0, reach, BLOCK):
                at = start + tl.arange(0, BLOCK)
                key = rising(tl.load(row + at, mask=at < reach, other=0.0))
                key = tl.where(at >= reach - local, 0x7FFFFFFF, key)
                among = at < reach
                if level > 0:
                    among = among & ((key >> (32 - 8 * level)) == (least >> (32 - 8 * level)))
                # the first bit is the sign
                own = ((key >> (24 - 8 * level)) & 255) ^ (128 if level == 0 else 0)
                counts += tl.histogram(own, 256, mask=among)
            from_here = tl.sum(counts, 0) - tl.cumsum(counts, 0) + counts
            found = tl.sum((from_here >= wanted).to(tl.int32), 0) - 1
            wanted -= tl.sum(tl.where(digit > found, counts, 0), 0)
            least = least | ((found ^ (128 if level == 0 else 0)) << (24 - 8 * level))
    chosen = 0
    equal = 0
    listed = 0
    part = tl.arange(0, BLOCK_P)
    for start in range(0, reach, BLOCK):
        at = start + tl.arange(0, BLOCK)
        there = at < reach
        if reach > top:
            key = rising(tl.load(row + at, mask=there, other=0.0))
            key = tl.where(at >= reach - local, 0x7FFFFFFF, key)
            same = there & (key == least)
            nth = equal + tl.cumsum(same.to(tl.int32), 0)
            taken = there & ((key > least) | (same & (nth <= wanted)))
            equal += tl.sum(same.to(tl.int32), 0)
        else:
            taken = there
        place = chosen + tl.cumsum(taken.to(tl.int32), 0) - 1
        tokens = at[:, None] * POOL + part[None, :]
        shown = taken[:, None] & (part < POOL)[None, :] & (tokens <= position)
        tl.store(to + place[:, None] * POOL + part[None, :], tokens, mask=shown)
        chosen += tl.sum(taken.to(tl.int32), 0)
        listed += tl.sum(tl.where(taken, tl.minimum(position + 1 - at * POOL, POOL), 0), 0)
    if TAIL:
        behind = reach * POOL + part
        tl.store(to + listed + part, behind, mask=(part < POOL) & (behind <= position))
        listed += position + 1 - reach * POOL
    for start in range(listed, width, BLOCK):
        at = start + tl.arange(0, BLOCK)
        tl.store(to + at, tl.full((BLOCK,), -1, dtype=tl.int32), mask=at < width)


@triton.jit
def pools_kernel(
    keys, gates, pooled, means, slots, positions,
    DIM: tl.constexpr, POOL: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_D: tl.constexpr, GATED: tl.constexpr,
):  # fmt: skip
    """Grid: (the step's tokens). Of one that ends a pool, the mean of the pool's keys, whose slots are in a row.

    GATED: weighted by the softmax of their gates, into row slot // POOL of `pooled`; else into the token's row of the
    float32 `means`.
    """
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + token)
    if (tl.load(positions + token) % POOL == POOL - 1) & (slot >= 0):
        part = tl.arange(0, BLOCK_P)
        column = tl.arange(0, BLOCK_D)
        inside = (part < POOL)[:, None] & (column < DIM)[None, :]
        at = (slot - POOL + 1 + part)[:, None] * DIM + column[None, :]
        k = tl.load(keys + at, mask=inside, other=0.0).to(tl.float32)
        if GATED:
            g = tl.load(gates + at, mask=inside, other=0.0).to(tl.float32)
            g = tl.where((part < POOL)[:, None], g, float("-inf"))
            g = tl.exp(g - tl.max(g, 0)[None, :])
            mean = tl.sum(g * k, 0) / tl.sum(g, 0)
            to = pooled + slot // POOL * DIM + column
            tl.store(to, mean.to(pooled.dtype.element_ty), mask=column < DIM)
        else:
            tl.store(means + token * DIM + column, tl.sum(k, 0) / POOL, mask=column < DIM)
