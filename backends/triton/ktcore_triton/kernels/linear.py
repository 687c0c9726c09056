"""Multiplication by a weight in the affine group layout: unpacked in registers, multiplied, summed in float32."""

import triton
import triton.language as tl


@triton.jit
def spread(some, ROWS: tl.constexpr, COLS: tl.constexpr, GROUP: tl.constexpr):
    """[ROWS, COLS] of [ROWS, groups], each repeated over its group's columns."""
    if COLS <= GROUP:
        wide = tl.broadcast_to(some, [ROWS, COLS])
    else:
        wide = tl.reshape(tl.broadcast_to(some[:, :, None], [ROWS, COLS // GROUP, GROUP]), [ROWS, COLS])
    return wide


@triton.jit
def scaled(
    plain, scale, offset, over, row, cols, column,
    GROUP: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, HAS_OFFSET: tl.constexpr, SCALES: tl.constexpr,
):  # fmt: skip
    """plain [ROWS, COLS] times its groups' scales, plus their offsets; SCALES as of `AffineWeight.scales`."""
    group = column // GROUP + tl.arange(0, 1 if COLS <= GROUP else COLS // GROUP)
    at = row[:, None] * (cols // GROUP) + group[None, :]
    some = tl.load(scale + at)
    # with an early return instead of the else branch the compiler would still read what comes after it
    if SCALES == "float":
        values = plain * spread(some.to(tl.float32), ROWS, COLS, GROUP)
        if HAS_OFFSET:
            values += spread(tl.load(offset + at).to(tl.float32), ROWS, COLS, GROUP)
    else:
        NUMBERS: tl.constexpr = 2 if HAS_OFFSET or SCALES == "nibbles" else 1
        block = over + (row * (cols // 256) + column // 256) * NUMBERS
        if SCALES == "nibbles":
            down = some >> 4
            some = some & 15
        elif HAS_OFFSET:
            down = tl.load(offset + at)
        factor = some.to(tl.float32) * tl.load(block).to(tl.float32)[:, None]
        values = plain * spread(factor, ROWS, COLS, GROUP)
        if NUMBERS == 2:
            less = down.to(tl.float32) * tl.load(block + 1).to(tl.float32)[:, None]
            values -= spread(less, ROWS, COLS, GROUP)
    return values


@triton.jit
def plane(held, SIDE: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, HALF: tl.constexpr):
    """int32 [ROWS, HALF]: codes of WIDTH bits of the first (SIDE 0) or second half of a span, from its bytes `held`."""
    BYTES: tl.constexpr = HALF * WIDTH // 4
    if BYTES == HALF:
        found = (held.to(tl.int32) >> SIDE * WIDTH) & ((1 << WIDTH) - 1)
    else:
        turn: tl.constexpr = SIDE * (HALF // BYTES)
        shift = (turn + tl.arange(0, HALF // BYTES)) * WIDTH
        turns = held.to(tl.int32)[:, None, :] >> shift[None, :, None]
        found = tl.reshape(turns & ((1 << WIDTH) - 1), [ROWS, HALF])
    return found


@triton.jit
def e4m3_values(codes):
    """float32 of uint8 codes in e4m3fn, by integers: chips without FP8 have it too. NaN is not looked for."""
    # sign, exponent and mantissa at float16's places; its exponent is biased by 8 more
    bits = ((codes & 128).to(tl.uint16) << 8) | ((codes & 127).to(tl.uint16) << 7)
    return bits.to(tl.float16, bitcast=True).to(tl.float32) * 256.0


@triton.jit
def multiply_add(
    total, x_row, x_mask, codes, scale, offset, over, row, cols, column,
    ZERO: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
    HAS_OFFSET: tl.constexpr, SCALES: tl.constexpr, COMPUTE: tl.constexpr, FLOAT8: tl.constexpr,
):  # fmt: skip
    """total [BM, ROWS] + x [BM, column .. column + COLS] @ values(codes [ROWS, COLS]).T."""
    x = tl.load(x_row[:, None] + column + tl.arange(0, COLS)[None, :], mask=x_mask[:, None], other=0.0)
    if FLOAT8:  # noqa: SIM108, either side is compiled only where it is taken
        values = e4m3_values(codes)
    else:
        values = (codes.to(tl.int32) - ZERO).to(tl.float32)
    values = scaled(values, scale, offset, over, row, cols, column, GROUP, ROWS, COLS, HAS_OFFSET, SCALES)
    return tl.dot(x.to(COMPUTE), tl.trans(values.to(COMPUTE)), total, input_precision="ieee")


@triton.jit
def affine_product(
    total, x_row, x_mask, codes, scale, offset, over, row, cols, first, last,
    BITS: tl.constexpr, ZERO: tl.constexpr, GROUP: tl.constexpr, SPAN: tl.constexpr, ROWS: tl.constexpr,
    HAS_OFFSET: tl.constexpr, SCALES: tl.constexpr, COMPUTE: tl.constexpr, FLOAT8: tl.constexpr,
):  # fmt: skip
    """total [BM, ROWS] + x @ weight[row].T over the columns first .. last, both multiples of SPAN.

    Args:
        x_row: pointers [BM] to the first column of rows of x; row: int64 [ROWS], rows of the weight that exist.
    """
    HALF: tl.constexpr = SPAN // 2
    LOW: tl.constexpr = 8 if BITS == 8 else (4 if BITS >= 4 else 2)
    for column in range(first, last, SPAN):
        low = codes + row[:, None] * (cols // 8 * BITS) + column // 8 * LOW
        # in halves: a whole span of values would not fit into registers
        if LOW < 8:
            held = tl.load(low + tl.arange(0, HALF * LOW // 4)[None, :])
        if BITS > LOW:
            high = codes + row[:, None] * (cols // 8 * BITS) + cols // 8 * LOW + column // 8 * (BITS - LOW)
            more = tl.load(high + tl.arange(0, HALF * (BITS - LOW) // 4)[None, :])
        for side in tl.static_range(2):
            if LOW == 8:
                some = tl.load(low + side * HALF + tl.arange(0, HALF)[None, :])
            else:
                some = plane(held, side, LOW, ROWS, HALF)
            if BITS > LOW:
                some |= plane(more, side, BITS - LOW, ROWS, HALF) << LOW
            total = multiply_add(
                total, x_row, x_mask, some, scale, offset, over, row, cols, column + side * HALF,
                ZERO, GROUP, ROWS, HALF, HAS_OFFSET, SCALES, COMPUTE, FLOAT8,
            )  # fmt: skip
    return total


@triton.jit
def linear_kernel(
    x, codes, scale, offset, over, bias, out, m, n, cols, part,
    BITS: tl.constexpr, ZERO: tl.constexpr, GROUP: tl.constexpr, SPAN: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    HAS_OFFSET: tl.constexpr, SCALES: tl.constexpr, HAS_BIAS: tl.constexpr, COMPUTE: tl.constexpr,
    FLOAT8: tl.constexpr,
):  # fmt: skip
    """out [splits, m, n]: part s sums the columns s * part .. (s + 1) * part. Grid: (n blocks, m blocks, splits)."""
    row = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    token = (tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    split = tl.program_id(2).to(tl.int64)
    # rows beyond the last read the last one again: no mask in the loop
    there = tl.minimum(row, n - 1).to(tl.int64)
    total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    first = tl.program_id(2) * part
    last = tl.minimum(first + part, cols)
    total = affine_product(
        total, x + token * cols, token < m, codes, scale, offset, over, there, cols, first, last,
        BITS, ZERO, GROUP, SPAN, BLOCK_N, HAS_OFFSET, SCALES, COMPUTE, FLOAT8,
    )  # fmt: skip
    if HAS_BIAS:
        total += tl.load(bias + there).to(tl.float32)[None, :]
    at = split * m * n + token[:, None] * n + row[None, :]
    tl.store(out + at, total.to(out.dtype.element_ty), mask=(token < m)[:, None] & (row < n)[None, :])
