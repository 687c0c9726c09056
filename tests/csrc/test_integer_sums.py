"""Every instruction set ends at the same integer sums, for every integer format, on the same packed bytes.

Each token has one group of 16 values that is not zero and whose int8 scale is a power of two; scales of weights that
have mins are powers of two as well. Then a result is rounded at most twice, in the same places with and without fused
multiply-add: all instruction sets must agree to the last bit, and a sum that is off by one is far outside the
rounding of the fp64 product.
"""

from __future__ import annotations

import os

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ktcore_cpu import _native

from .blocks import F32, HALF_FIELDS, random_blocks, reference, run_linear

FLOATS = {"F16", "BF16", "F32", "F8_E4M3_G128", "F8_E4M3_G32"}
INTEGER = [f for f in _native.formats() if f not in FLOATS]
GROUP = 16


@pytest.fixture(scope="module")
def pools() -> dict[str, _native.Pool]:
    before = os.environ.get("KTCORE_ISA")
    made = {}
    for isa in _native.isa_supported() + _native.isa_emulated():
        os.environ["KTCORE_ISA"] = isa
        made[isa] = _native.Pool(1)
    os.environ.pop("KTCORE_ISA")
    if before is not None:
        os.environ["KTCORE_ISA"] = before
    return made


def blocks_of(format: str, rows: int, cols: int, seed: int) -> np.ndarray:
    """Random codes; half-precision scales are powers of two of either sign."""
    size = _native.formats()[format][1]
    raw = random_blocks(format, rows, cols, seed).reshape(-1, size)
    rng = np.random.default_rng(seed + 1)
    for at in HALF_FIELDS.get(format, ()):
        scale = np.ldexp(rng.choice([-1.0, 1.0], len(raw)), rng.integers(-9, -3, len(raw))).astype(np.float16)
        raw[:, at : at + 2] = scale[:, None].view(np.uint8)
    if format.startswith("INT"):  # a half or a bfloat16: without its mantissa it is a power of two, or zero
        word, is_bfloat = raw[:, :2].copy().view(np.uint16), raw[:, 3:4] >> 7
        raw[:, :2] = (word & np.where(is_bfloat, 0xFF80, 0xFC00)).astype(np.uint16).view(np.uint8)
    return raw.reshape(rows, -1)


def one_group_a_token(tokens: int, cols: int, seed: int) -> F32:
    """Codes -127 to 127 of one group a token, times a power of two; the largest code is in it, so that is the scale."""
    rng = np.random.default_rng(seed)
    x = np.zeros((tokens, cols // GROUP, GROUP), np.float32)
    codes = rng.choice([-127, 127], (tokens, GROUP)) if seed % 4 == 0 else rng.integers(-127, 128, (tokens, GROUP))
    codes[np.arange(tokens), rng.integers(0, GROUP, tokens)] = 127
    at = rng.integers(0, cols // GROUP, tokens)
    x[np.arange(tokens), at] = np.ldexp(codes.astype(np.float32), rng.integers(-8, 3, (tokens, 1)))
    return x.reshape(tokens, cols)


@pytest.mark.parametrize("format", INTEGER)
@settings(max_examples=6, deadline=None)
@given(rows=st.integers(1, 70), blocks=st.integers(1, 3), tokens=st.integers(1, 40), seed=st.integers(0, 1 << 20))
def test_sums_agree_to_the_last_bit(
    pools: dict[str, _native.Pool], format: str, rows: int, blocks: int, tokens: int, seed: int
) -> None:
    cols = blocks * max(_native.formats()[format][0], 32 * (seed % 9 + 1))
    cols -= cols % _native.formats()[format][0]
    raw = blocks_of(format, rows, cols, seed)
    x = one_group_a_token(tokens, cols, seed)
    outs = {}
    for isa, pool in pools.items():
        outs[isa] = run_linear(pool, _native.PackedMatrix.pack(pool, format, rows, cols, raw), x)
        np.testing.assert_array_equal(outs[isa].view(np.int32), outs["scalar"].view(np.int32), isa)
    want = x.astype(np.float64) @ reference(format, raw, rows, cols).astype(np.float64).T
    # Grid formats round their scales once more than the gguf package's floats do.
    size = np.abs(x).astype(np.float64) @ np.abs(reference(format, raw, rows, cols)).astype(np.float64).T
    assert (np.abs(outs["scalar"] - want) <= 4e-7 * size + 1e-30).all()
