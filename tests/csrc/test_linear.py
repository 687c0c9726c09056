"""Linear layers of every format and instruction set against fp64 math on the dequantised weights."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from ktcore_cpu import _native

from .blocks import F32, HALF_FIELDS, random_blocks, reference, run_linear

FORMATS = list(_native.formats())
BFLOAT = ["BF16", "F8_E4M3_G128", "F8_E4M3_G32"]  # whose inputs are rounded to bfloat16 where the CPU multiplies that
INTEGER = [f for f, (block, _) in _native.formats().items() if block > 1 and f not in BFLOAT]
TOKENS = (1, 2, 5, 6, 7, 13, 33)
GROUP = 16


def make(pool: _native.Pool, format: str, rows: int, cols: int) -> tuple[_native.PackedMatrix, np.ndarray]:
    raw = random_blocks(format, rows, cols)
    return _native.PackedMatrix.pack(pool, format, rows, cols, raw), reference(format, raw, rows, cols).astype(
        np.float64
    )


def inputs(tokens: int, cols: int, seed: int = 1) -> F32:
    """Normal values with an outlier channel, as real activations have."""
    x = np.random.default_rng(seed).standard_normal((tokens, cols)).astype(np.float32)
    x[:, :: max(2, cols // 3)] *= 8
    return x


def rounding_bound(x: F32, w: np.ndarray) -> np.ndarray:
    """The most that rounding each value to its group's int8 step can change each output."""
    groups = np.abs(x).reshape(len(x), -1, GROUP).max(-1) / 127
    return np.repeat(groups * 0.5001, GROUP, 1).astype(np.float64) @ np.abs(w).T


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize(("rows", "cols"), [(31, 256), (70, 768)])
def test_exact_mode_is_fp64_math_to_float_rounding(pool: _native.Pool, format: str, rows: int, cols: int) -> None:
    w, dense = make(pool, format, rows, cols)
    for tokens in TOKENS:
        x = inputs(tokens, cols)
        want = x.astype(np.float64) @ dense.T
        got = run_linear(pool, w, x, exact=True)
        assert np.abs(got - want).max() <= 1e-5 * np.abs(want).max()


@pytest.mark.parametrize("format", INTEGER)
@pytest.mark.parametrize(("rows", "cols"), [(31, 256), (70, 1280)])
def test_int8_mode_is_within_the_rounding_of_activations(pool: _native.Pool, format: str, rows: int, cols: int) -> None:
    w, dense = make(pool, format, rows, cols)
    for tokens in TOKENS:
        x = inputs(tokens, cols)
        want = x.astype(np.float64) @ dense.T
        error = np.abs(run_linear(pool, w, x) - want)
        assert (error <= rounding_bound(x, dense) + 1e-5 * np.abs(want).max()).all()
        # Far below the bound on the whole: errors are independent.
        assert np.sqrt((error**2).mean()) <= 0.02 * np.sqrt((want**2).mean())


@pytest.mark.parametrize("format", INTEGER)
def test_int8_mode_equals_fp64_math_on_rounded_activations(pool: _native.Pool, format: str) -> None:
    w, dense = make(pool, format, 70, 768)
    x = inputs(13, 768)
    groups = x.reshape(13, -1, GROUP)
    step = np.abs(groups).max(-1, keepdims=True) / np.float32(127)
    codes = np.rint(groups * (np.float32(127) / np.abs(groups).max(-1, keepdims=True)))
    want = (codes.astype(np.float64) * step).reshape(13, -1) @ dense.T
    assert np.abs(run_linear(pool, w, x) - want).max() <= 1e-5 * np.abs(want).max()


@pytest.mark.parametrize("format", [*INTEGER, "F8_E4M3_G128", "F8_E4M3_G32"])
def test_extreme_codes_do_not_saturate(pool: _native.Pool, format: str) -> None:
    size = _native.formats()[format][1]
    sane = random_blocks(format, 32, 256).reshape(-1, size)
    raw = np.full_like(sane, 0xFF)
    if format == "Q8_0":
        raw[:, 2:] = 0x7F  # +127, with offset 255: the products that overflow 16 bits
    for at in HALF_FIELDS.get(format, ()):
        raw[:, at : at + 2] = np.frombuffer(np.float16(0.01).tobytes(), np.uint8)
    if format not in HALF_FIELDS:  # scales of other kinds: those of a random block
        head = {"IQ1_M": slice(48, 56), "IQ1_M_FAST": slice(48, 56), "MXFP4": slice(0, 1)}.get(format, slice(0, 4))
        raw[:, head] = sane[:, head]
    if format == "NVFP4_G128":
        for at in (4, 40):
            raw[:, at : at + 4] = sane[:, at : at + 4]
    if format.startswith("F8"):
        raw[:, 4:] = 0xFE
    dense = reference(format, raw.reshape(32, -1), 32, 256).astype(np.float64)
    w = _native.PackedMatrix.pack(pool, format, 32, 256, raw.reshape(32, -1))
    x = np.ones((7, 256), np.float32)
    x[::2] *= -1
    want = x @ dense.T
    assert np.abs(run_linear(pool, w, x) - want).max() <= 1e-4 * np.abs(want).max()


@pytest.mark.parametrize("format", BFLOAT)
def test_bfloat16_mode_equals_fp64_math_on_rounded_inputs(pool: _native.Pool, isa: str, format: str) -> None:
    w, dense = make(pool, format, 70, 768)
    for tokens in (*TOKENS, 12, 25):
        x = inputs(tokens, 768)
        rounds = isa in ("avx512_bf16", "amx", "amx_emulated")
        seen = torch.from_numpy(x).bfloat16().double().numpy() if rounds else x.astype(np.float64)
        want = seen @ dense.T
        assert np.abs(run_linear(pool, w, x) - want).max() <= 1e-5 * np.abs(want).max()


def test_fp8_codes_are_exact_in_every_kernel(pool: _native.Pool) -> None:
    # Row r, column c: code (r * 128 + c) % 127, of both signs; a one-hot input reads the weights, subnormals too.
    codes = (np.arange(64 * 128) % 127).astype(np.uint8).reshape(64, 128) | (np.arange(64) % 2 * 128).astype(np.uint8)[
        :, None
    ]
    raw = np.concatenate([np.full((64, 1), 0.5, np.float32).view(np.uint8), codes], 1)
    dense = reference("F8_E4M3_G128", raw, 64, 128)
    w = _native.PackedMatrix.pack(pool, "F8_E4M3_G128", 64, 128, raw)
    for tokens in (1, 4, 128):
        x = np.eye(128, dtype=np.float32)[:tokens]
        np.testing.assert_array_equal(run_linear(pool, w, x), dense.T[:tokens])


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("exact", [False, True])
def test_instruction_sets_agree_to_float_rounding(
    pool_of: Callable[[str], _native.Pool], format: str, exact: bool
) -> None:
    x = inputs(13, 512)
    outs = []
    for isa in _native.isa_supported():
        pool = pool_of(isa)
        outs.append(run_linear(pool, make(pool, format, 70, 512)[0], x, exact=exact))
    limit = 1e-2 if format in BFLOAT and not exact else 3e-6  # rounded inputs: their own test is above
    for other in outs[1:]:
        assert np.abs(other - outs[0]).max() <= limit * np.abs(outs[0]).max()


@pytest.mark.parametrize("format", FORMATS)
def test_a_token_does_not_depend_on_its_batch_or_on_threads(
    pool_of: Callable[..., _native.Pool], isa: str, format: str
) -> None:
    pool = pool_of(isa, 2)
    w, _ = make(pool, format, 70, 768)
    x = inputs(150, 768)
    whole = run_linear(pool, w, x)
    np.testing.assert_array_equal(whole, run_linear(pool_of(isa, 1), w, x))
    np.testing.assert_array_equal(whole, run_linear(pool_of(isa, 5), w, x))
    for start, end in ((0, 1), (1, 3), (3, 6), (6, 10), (10, 15), (15, 21), (149, 150)):
        np.testing.assert_array_equal(whole[start:end], run_linear(pool, w, x[start:end]))


def test_bias_is_added(pool: _native.Pool) -> None:
    w, dense = make(pool, "Q8_0", 70, 64)
    x, bias = inputs(3, 64), np.arange(70, dtype=np.float32)
    np.testing.assert_allclose(run_linear(pool, w, x, bias, True), x @ dense.T + bias, rtol=1e-4, atol=1e-4)


def test_zero_rows_of_activations_give_zero(pool: _native.Pool) -> None:
    w, _ = make(pool, "Q4_1", 32, 64)
    assert (run_linear(pool, w, np.zeros((7, 64), np.float32)) == 0).all()


def test_bad_arguments_are_refused() -> None:
    pool = _native.Pool(1)
    w, _ = make(pool, "Q8_0", 32, 32)
    x = np.zeros((1, 32), np.float32)
    with pytest.raises(ValueError, match="x_ptr"):
        _native.linear(pool, w, 0, x.ctypes.data, 1)
    with pytest.raises(ValueError, match="out_ptr"):
        _native.linear(pool, w, x.ctypes.data, 2, 1)
    for tokens in (-1, 1 << 40):
        with pytest.raises(ValueError, match="tokens"):
            _native.linear(pool, w, x.ctypes.data, x.ctypes.data, tokens)
    with pytest.raises(TypeError):
        _native.linear(pool, None, x.ctypes.data, x.ctypes.data, 1)  # type: ignore[arg-type]
