"""Products of 8-bit floats on matrix units that have them: activations are quantised, each 128 values by a scale."""

import triton
import triton.language as tl


@triton.jit
def quantise_kernel(x, codes, scales, tokens, cols, top, BIAS: tl.constexpr, GROUP: tl.constexpr):
    """codes uint8 [tokens, cols] and scales [cols / GROUP, tokens] of x, scale = max |x| / top. Grid: (tokens, groups).

    A group that holds NaN or Inf has no codes: its scale, NaN or Inf, times their zero makes every product with it NaN.
    Numbers have 4 bits of exponent, biased by BIAS, and 3 of mantissa; ties go to even. By integers, since chips (and
    the interpreter) round in ways of their own.
    """
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * GROUP + tl.arange(0, GROUP)
    values = tl.load(x + token * cols + column).to(tl.float32)
    size = tl.abs(values)
    # the largest by the order of bit patterns: above all numbers is Inf, and NaN above that
    most = tl.max(size.to(tl.int32, bitcast=True), 0).to(tl.float32, bitcast=True)
    scale = tl.where(most == 0, 1.0, most / top)
    size = tl.where(most < float("inf"), tl.minimum(size / scale, top), 0.0)
    exponent = tl.maximum((size.to(tl.int32, bitcast=True) >> 23) - 127, 1 - BIAS)
    # in units of the mantissa's last bit, which is below 17: adding 1.5 * 2^23 leaves no fraction
    units = size * ((130 - exponent) << 23).to(tl.float32, bitcast=True)
    units = (units + 12582912.0) - 12582912.0
    code = ((exponent + (BIAS - 1)) << 3) + units.to(tl.int32)
    # without a negative zero, which is no number where BIAS is 8
    code = tl.where((values < 0) & (code > 0), code | 128, code)
    tl.store(codes + token * cols + column, code.to(tl.uint8))
    tl.store(scales + tl.program_id(1).to(tl.int64) * tokens + token, scale)


@triton.jit
def product_kernel(
    x, x_scales, codes, scales, bias, out, m, n, cols,
    GROUP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, HAS_BIAS: tl.constexpr, KIND: tl.constexpr,
):  # fmt: skip
    """out [m, n] = x @ codes.T, a group's products summed apart, scaled and added up in float32. Grid: (n, m blocks).

    x [m, cols], codes [n, cols] uint8 that hold numbers of KIND; x_scales [cols / GROUP, m], scales [n, cols / GROUP].
    """
    row = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    token = (tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    # rows and tokens beyond the last read the last one again: no mask in the loop
    there = tl.minimum(row, n - 1).to(tl.int64)
    present = tl.minimum(token, m - 1)
    total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    within = tl.arange(0, GROUP)
    for group in range(0, cols // GROUP):
        at = group * GROUP + within
        left = tl.load(x + present[:, None] * cols + at[None, :]).to(KIND, bitcast=True)
        right = tl.load(codes + there[:, None] * cols + at[None, :]).to(KIND, bitcast=True)
        part = tl.dot(left, tl.trans(right))
        of_x = tl.load(x_scales + group * m + present)
        of_w = tl.load(scales + there * (cols // GROUP) + group)
        total += part * of_x[:, None] * of_w[None, :]
    if HAS_BIAS:
        total += tl.load(bias + there).to(tl.float32)[None, :]
    tl.store(
        out + token[:, None] * n + row[None, :], total.to(out.dtype.element_ty),
        mask=(token < m)[:, None] & (row < n)[None, :],
    )  # fmt: skip
