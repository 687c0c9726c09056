"""Attention over a paged cache, one kernel for prefill, decode and latent (MLA) decode; long contexts in splits.

A program takes BLOCK_M rows of one sequence and one key head. Row r is query r // GROUP and head r % GROUP of those
that share the key head, so that decode fills a tile with heads and prefill with queries.
"""

import triton
import triton.language as tl


@triton.jit
def attention_kernel(
    q, keys, values, sinks, out, lse, q_start, context_lens, table,
    scale, heads, kv_heads, key_stride, value_stride, table_stride, page_size, window, chunk, splits, tokens,
    GROUP: tl.constexpr, KEY_DIM: tl.constexpr, MAIN: tl.constexpr, REST: tl.constexpr, VALUE_DIM: tl.constexpr,
    BLOCK_V: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    PART: tl.constexpr, LATENT: tl.constexpr, HAS_SINKS: tl.constexpr, SPLIT: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """Grid: (row blocks, kv_heads * splits, sequences). Online softmax over the keys of one split.

    q [T, heads, KEY_DIM]; keys, values: rows of a cache, `*_stride` elements apart, a head's part KEY_DIM or VALUE_DIM
    wide. The first MAIN values of a key and the REST after them are multiplied apart (576 = 512 + 64); PART of MAIN at
    a time, where PART is less, which takes fewer registers and reads queries again for each block of keys. LATENT: the
    first VALUE_DIM of a key are its value. out [T, heads, VALUE_DIM], or with SPLIT float32 [splits, T, heads,
    VALUE_DIM] and lse [splits, T, heads].
    """
    sequence = tl.program_id(2)
    kv_head = tl.program_id(1) // splits
    split = tl.program_id(1) % splits
    first_token = tl.load(q_start + sequence)
    queries = tl.load(q_start + sequence + 1) - first_token
    context = tl.load(context_lens + sequence)
    first_row = tl.program_id(0) * BLOCK_M
    if first_row < queries * GROUP:
        row = first_row + tl.arange(0, BLOCK_M)
        query = row // GROUP
        inside = query < queries
        token = (first_token + tl.minimum(query, queries - 1)).to(tl.int64)
        head = kv_head * GROUP + row % GROUP
        position = context - queries + query

        main = tl.arange(0, MAIN)
        rest = MAIN + tl.arange(0, REST)
        at = (token * heads + head) * KEY_DIM
        if PART == MAIN:
            q_main = tl.load(q + at[:, None] + main[None, :], mask=(main < KEY_DIM)[None, :], other=0.0).to(COMPUTE)
        q_rest = tl.load(q + at[:, None] + rest[None, :], mask=(rest < KEY_DIM)[None, :], other=0.0).to(COMPUTE)
        column = tl.arange(0, BLOCK_V)

        top = tl.full((BLOCK_M,), float("-inf"), dtype=tl.float32)
        denominator = tl.zeros((BLOCK_M,), dtype=tl.float32)
        total = tl.zeros((BLOCK_M, BLOCK_V), dtype=tl.float32)

        # keys that any row of the block may see, cut into equal splits of whole blocks
        least = context - queries + first_row // GROUP
        most = tl.minimum(context - queries + (first_row + BLOCK_M - 1) // GROUP + 1, context)
        begin = 0
        if window > 0:
            begin = tl.maximum(least - window + 1, 0)
        if chunk > 0:
            begin = tl.maximum(least // chunk * chunk, begin)
        begin = begin // BLOCK_N * BLOCK_N
        part = tl.cdiv(tl.cdiv(most - begin, BLOCK_N), splits) * BLOCK_N
        begin += split * part
        end = tl.minimum(begin + part, most)
        for start in range(begin, end, BLOCK_N):
            key = start + tl.arange(0, BLOCK_N)
            there = key < end
            page = tl.load(table + sequence.to(tl.int64) * table_stride + key // page_size, mask=there, other=0)
            slot = page.to(tl.int64) * page_size + key % page_size
            key_at = slot * key_stride + kv_head * KEY_DIM
            if PART == MAIN:
                k = tl.load(
                    keys + key_at[:, None] + main[None, :], mask=there[:, None] & (main < KEY_DIM)[None, :], other=0.0
                ).to(COMPUTE)
                score = tl.dot(q_main, tl.trans(k), input_precision="ieee")
            else:
                score = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
                for begun in range(0, MAIN, PART):
                    some = begun + tl.arange(0, PART)
                    q_some = tl.load(q + at[:, None] + some[None, :], mask=(some < KEY_DIM)[None, :], other=0.0)
                    k_some = tl.load(
                        keys + key_at[:, None] + some[None, :], mask=there[:, None] & (some < KEY_DIM)[None, :],
                        other=0.0,
                    )  # fmt: skip
                    score = tl.dot(q_some.to(COMPUTE), tl.trans(k_some.to(COMPUTE)), score, input_precision="ieee")
            if KEY_DIM > MAIN:
                k_rest = tl.load(
                    keys + key_at[:, None] + rest[None, :], mask=there[:, None] & (rest < KEY_DIM)[None, :], other=0.0
                ).to(COMPUTE)
                score = tl.dot(q_rest, tl.trans(k_rest), score, input_precision="ieee")
            seen = there[None, :] & (key[None, :] <= position[:, None])
            if window > 0:
                seen = seen & (key[None, :] > position[:, None] - window)
            if chunk > 0:
                seen = seen & (key[None, :] // chunk == position[:, None] // chunk)
            score = tl.where(seen, score * scale, float("-inf"))
            higher = tl.maximum(top, tl.max(score, 1))
            # a row that has seen no key yet has no maximum: zero keeps the exponents finite
            base = tl.where(higher == float("-inf"), 0.0, higher)
            weight = tl.exp(score - base[:, None])
            shrink = tl.exp(top - base)
            if LATENT and PART == MAIN:
                v = k
            elif LATENT:
                v = tl.load(
                    keys + key_at[:, None] + column[None, :],
                    mask=there[:, None] & (column < VALUE_DIM)[None, :], other=0.0,
                ).to(COMPUTE)  # fmt: skip
            else:
                v = tl.load(
                    values + slot[:, None] * value_stride + kv_head * VALUE_DIM + column[None, :],
                    mask=there[:, None] & (column < VALUE_DIM)[None, :], other=0.0,
                ).to(COMPUTE)  # fmt: skip
            total = tl.dot(weight.to(COMPUTE), v, total * shrink[:, None], input_precision="ieee")
            denominator = denominator * shrink + tl.sum(weight, 1)
            top = higher

        base = tl.where(top == float("-inf"), 0.0, top)
        to = token * heads + head
        if SPLIT:
            to += split.to(tl.int64) * tokens * heads
            whole = tl.where(denominator > 0, base + tl.log(tl.maximum(denominator, 1e-38)), float("-inf"))
            tl.store(lse + to, whole, mask=inside)
        elif HAS_SINKS:
            denominator += tl.exp(tl.load(sinks + head).to(tl.float32) - base)
        total = total / tl.maximum(denominator, 1e-38)[:, None]
        tl.store(
            out + to[:, None] * VALUE_DIM + column[None, :], total.to(out.dtype.element_ty),
            mask=inside[:, None] & (column < VALUE_DIM)[None, :],
        )  # fmt: skip


@triton.jit
def merge_kernel(
    parts, lse, sinks, out, rows, heads, splits,
    VALUE_DIM: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_S: tl.constexpr, HAS_SINKS: tl.constexpr,
):  # fmt: skip
    """One row (token and head) a program: the splits' results weighed by exp(lse)."""
    row = tl.program_id(0).to(tl.int64)
    split = tl.arange(0, BLOCK_S)
    column = tl.arange(0, BLOCK_V)
    sums = tl.load(lse + split * rows + row, mask=split < splits, other=float("-inf"))
    top = tl.max(sums, 0)
    # a row may have seen no key: its result is 0
    top = tl.where(top == float("-inf"), 0.0, top)
    weight = tl.exp(sums - top)
    denominator = tl.sum(weight, 0)
    if HAS_SINKS:
        denominator += tl.exp(tl.load(sinks + row % heads).to(tl.float32) - top)
    at = (split.to(tl.int64)[:, None] * rows + row) * VALUE_DIM + column[None, :]
    some = tl.load(parts + at, mask=(split < splits)[:, None] & (column < VALUE_DIM)[None, :], other=0.0)
    total = tl.sum(some * weight[:, None], 0) / tl.maximum(denominator, 1e-38)
    tl.store(out + row * VALUE_DIM + column, total.to(out.dtype.element_ty), mask=column < VALUE_DIM)
