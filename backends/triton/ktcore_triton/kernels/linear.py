"""Multiplication by a weight in the affine group layout: unpacked in registers, multiplied, summed in float32."""

import triton
import triton.language as tl


@triton.jit
def groups_of(pointer, row, cols, column, ROWS: tl.constexpr, COLS: tl.constexpr, GROUP: tl.constexpr):
    """float32 [ROWS, COLS] of scales or offsets [*, cols / GROUP], each repeated over its group's columns."""
    # with an early return instead of the else branch the compiler would still read what comes after it
    if COLS <= GROUP:
        one = tl.load(pointer + row * (cols // GROUP) + column // GROUP).to(tl.float32)
        spread = tl.broadcast_to(one[:, None], [ROWS, COLS])
    else:
        group = column // GROUP + tl.arange(0, COLS // GROUP)
        some = tl.load(pointer + row[:, None] * (cols // GROUP) + group[None, :]).to(tl.float32)
        spread = tl.reshape(tl.broadcast_to(some[:, :, None], [ROWS, COLS // GROUP, GROUP]), [ROWS, COLS])
    return spread


@triton.jit
def e4m3_values(codes):
    """float32 of uint8 codes in e4m3fn, by integers: chips without FP8 have it too. NaN is not looked for."""
    # sign, exponent and mantissa at float16's places; its exponent is biased by 8 more
    bits = ((codes & 128).to(tl.uint16) << 8) | ((codes & 127).to(tl.uint16) << 7)
    return bits.to(tl.float16, bitcast=True).to(tl.float32) * 256.0


@triton.jit
def multiply_add(
    total, x_row, x_mask, codes, scale, offset, row, cols, column,
    ZERO: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
    HAS_OFFSET: tl.constexpr, COMPUTE: tl.constexpr, FLOAT8: tl.constexpr,
):  # fmt: skip
    """total [BM, ROWS] + x [BM, column .. column + COLS] @ values(codes [ROWS, COLS]).T."""
    x = tl.load(x_row[:, None] + column + tl.arange(0, COLS)[None, :], mask=x_mask[:, None], other=0.0)
    if FLOAT8:  # noqa: SIM108, either side is compiled only where it is taken
        values = e4m3_values(codes)
    else:
        values = (codes.to(tl.int32) - ZERO).to(tl.float32)
    values = values * groups_of(scale, row, cols, column, ROWS, COLS, GROUP)
    if HAS_OFFSET:
        values = values + groups_of(offset, row, cols, column, ROWS, COLS, GROUP)
    return tl.dot(x.to(COMPUTE), tl.trans(values.to(COMPUTE)), total, input_precision="ieee")


@triton.jit
def affine_product(
    total, x_row, x_mask, codes, scale, offset, row, cols, first, last,
    BITS: tl.constexpr, ZERO: tl.constexpr, GROUP: tl.constexpr, SPAN: tl.constexpr, ROWS: tl.constexpr,
    HAS_OFFSET: tl.constexpr, COMPUTE: tl.constexpr, FLOAT8: tl.constexpr,
):  # fmt: skip
    """total [BM, ROWS] + x @ weight[row].T over the columns first .. last, both multiples of SPAN.

    Args:
        x_row: pointers [BM] to the first column of rows of x; row: int64 [ROWS], rows of the weight that exist.
    """
    HALF: tl.constexpr = SPAN // 2
    for column in range(first, last, SPAN):
        if BITS == 4:
            at = row[:, None] * (cols // 2) + column // 2 + tl.arange(0, HALF)[None, :]
            both = tl.load(codes + at)
            total = multiply_add(
                total, x_row, x_mask, both & 15, scale, offset, row, cols, column,
                ZERO, GROUP, ROWS, HALF, HAS_OFFSET, COMPUTE, FLOAT8,
            )  # fmt: skip
            total = multiply_add(
                total, x_row, x_mask, both >> 4, scale, offset, row, cols, column + HALF,
                ZERO, GROUP, ROWS, HALF, HAS_OFFSET, COMPUTE, FLOAT8,
            )  # fmt: skip
        else:
            # in halves as well: a whole span of values would not fit into registers
            at = row[:, None] * cols + column + tl.arange(0, HALF)[None, :]
            total = multiply_add(
                total, x_row, x_mask, tl.load(codes + at), scale, offset, row, cols, column,
                ZERO, GROUP, ROWS, HALF, HAS_OFFSET, COMPUTE, FLOAT8,
            )  # fmt: skip
            total = multiply_add(
                total, x_row, x_mask, tl.load(codes + at + HALF), scale, offset, row, cols, column + HALF,
                ZERO, GROUP, ROWS, HALF, HAS_OFFSET, COMPUTE, FLOAT8,
            )  # fmt: skip
    return total


@triton.jit
def linear_kernel(
    x, codes, scale, offset, bias, out, m, n, cols, part,
    BITS: tl.constexpr, ZERO: tl.constexpr, GROUP: tl.constexpr, SPAN: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    HAS_OFFSET: tl.constexpr, HAS_BIAS: tl.constexpr, COMPUTE: tl.constexpr, FLOAT8: tl.constexpr,
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
        total, x + token * cols, token < m, codes, scale, offset, there, cols, first, last,
        BITS, ZERO, GROUP, SPAN, BLOCK_N, HAS_OFFSET, COMPUTE, FLOAT8,
    )  # fmt: skip
    if HAS_BIAS:
        total += tl.load(bias + there).to(tl.float32)[None, :]
    at = split * m * n + token[:, None] * n + row[None, :]
    tl.store(out + at, total.to(out.dtype.element_ty), mask=(token < m)[:, None] & (row < n)[None, :])
