"""Attention over chosen tokens of a paged cache: the online softmax of `attention_kernel` over gathered keys.

Its sums run in the same order, so that a choice of all tokens gives the bits of attention over all.
"""

import triton
import triton.language as tl


@triton.jit
def chosen_kernel(
    q, keys, values, sinks, out, lse, chosen, positions, sequences, table,
    scale, heads, kv_heads, key_stride, value_stride, table_stride, page_size, window, chunk, splits, tokens,
    width, chosen_heads,
    GROUP: tl.constexpr, KEY_DIM: tl.constexpr, MAIN: tl.constexpr, REST: tl.constexpr, VALUE_DIM: tl.constexpr,
    BLOCK_V: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    PART: tl.constexpr, LATENT: tl.constexpr, HAS_SINKS: tl.constexpr, SPLIT: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """Grid: (row blocks of a key head, kv_heads * splits, tokens); one query a program.

    chosen [T, chosen_heads, width], of each key head or (chosen_heads 1) of all: positions that rise, then -1; they
    are cut into equal splits of whole blocks. sequences [T] tells whose line of `table` a token reads. All else as in
    `attention_kernel`.
    """
    token = tl.program_id(2).to(tl.int64)
    kv_head = tl.program_id(1) // splits
    split = tl.program_id(1) % splits
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = row < GROUP
    head = kv_head * GROUP + row % GROUP
    position = tl.load(positions + token).to(tl.int32)
    pages = table + tl.load(sequences + token).to(tl.int64) * table_stride
    choice = chosen + (token * chosen_heads + tl.minimum(kv_head, chosen_heads - 1)) * width

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

    # there are no more than a query's tokens and those before it
    most = tl.minimum(position + 1, width)
    part = tl.cdiv(tl.cdiv(most, BLOCK_N), splits) * BLOCK_N
    begin = split * part
    end = tl.minimum(begin + part, most)
    for start in range(begin, end, BLOCK_N):
        place = start + tl.arange(0, BLOCK_N)
        key = tl.load(choice + place, mask=place < end, other=-1)
        there = (key >= 0) & (key <= position)
        if window > 0:
            there = there & (key > position - window)
        if chunk > 0:
            there = there & (key // chunk == position // chunk)
        page = tl.load(pages + key // page_size, mask=there, other=0)
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
                    keys + key_at[:, None] + some[None, :], mask=there[:, None] & (some < KEY_DIM)[None, :], other=0.0
                )
                score = tl.dot(q_some.to(COMPUTE), tl.trans(k_some.to(COMPUTE)), score, input_precision="ieee")
        if KEY_DIM > MAIN:
            k_rest = tl.load(
                keys + key_at[:, None] + rest[None, :], mask=there[:, None] & (rest < KEY_DIM)[None, :], other=0.0
            ).to(COMPUTE)
            score = tl.dot(q_rest, tl.trans(k_rest), score, input_precision="ieee")
        score = tl.where(there[None, :], score * scale, float("-inf"))
        higher = tl.maximum(top, tl.max(score, 1))
        # a row that has seen no key yet has no maximum: zero keeps the exponents finite
        base = tl.where(higher == float("-inf"), 0.0, higher)
        weight = tl.exp(score - base[:, None])
        shrink = tl.exp(top - base)
        if LATENT and PART == MAIN:
            v = k
        elif LATENT:
            v = tl.load(
                keys + key_at[:, None] + column[None, :], mask=there[:, None] & (column < VALUE_DIM)[None, :], other=0.0
            ).to(COMPUTE)
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
