"""The feed-forward block and the single row-wise functions against torch in fp64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from ktcore_cpu import _native

from .blocks import random_blocks, reference
from .test_expert_variants import AFTER, BEFORE, OSS, within

ACTIVATIONS = {
    "silu": torch.nn.functional.silu,
    "relu": torch.relu,
    "gelu_tanh": lambda x: torch.nn.functional.gelu(x, approximate="tanh"),
}


def make(
    pool: _native.Pool, formats: tuple[str, str, str], hidden: int, ffn: int, activation: str, exact: bool, **more
):  # type: ignore[no-untyped-def]
    shapes = ((ffn, hidden), (ffn, hidden), (hidden, ffn))
    packed, dense = [], []
    for seed, (format, (rows, cols)) in enumerate(zip(formats, shapes, strict=True)):
        raw = random_blocks(format, rows, cols, seed)
        packed.append(_native.PackedMatrix.pack(pool, format, rows, cols, raw))
        dense.append(torch.from_numpy(reference(format, raw, rows, cols)).double())
    norm = (1 + 0.3 * np.random.default_rng(4).standard_normal(hidden)).astype(np.float32)
    block = _native.MLPBlock(pool, *packed, norm, 1e-5, activation, exact=exact, **more)

    def expected(x: np.ndarray, residual: bool = True) -> np.ndarray:
        h = torch.from_numpy(x).double()
        n = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-5) * torch.from_numpy(norm).double()
        gate, up = n @ dense[0].T, n @ dense[1].T
        y = (within(gate, up, more["clamp"]) if "clamp" in more else ACTIVATIONS[activation](gate) * up) @ dense[2].T
        return (h * residual + y).numpy()

    return block, expected


def rows(n: int, width: int) -> np.ndarray:
    return np.random.default_rng(8).standard_normal((n, width)).astype(np.float32)


@pytest.mark.parametrize("clamp", [OSS, BEFORE, AFTER])
@pytest.mark.parametrize("formats", [("Q4_K", "Q4_K", "Q6_K"), ("F16", "Q8_0", "BF16")])
def test_a_block_within_limits_equals_fp64(
    pool: _native.Pool, formats: tuple[str, str, str], clamp: tuple[float, float, float, bool]
) -> None:
    block, expected = make(pool, formats, 256, 512, "relu", True, clamp=clamp)
    for tokens in (1, 33):
        x = rows(tokens, 256)
        want, out = expected(x), np.full_like(x, np.nan)
        block.forward(x.ctypes.data, out.ctypes.data, tokens)
        assert np.abs(out - want).max() <= 2e-5 * np.abs(want).max()


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(
    "formats", [("Q4_1",) * 3, ("Q4_K", "Q4_K", "Q6_K"), ("F16", "Q8_0", "BF16"), ("Q8_0", "F32", "Q4_0")]
)
def test_exact_block_equals_fp64(pool: _native.Pool, activation: str, formats: tuple[str, str, str]) -> None:
    block, expected = make(pool, formats, 256, 512, activation, True)
    for tokens in (1, 6, 33):
        x = rows(tokens, 256)
        want = expected(x)
        out = np.full_like(x, np.nan)
        block.forward(x.ctypes.data, out.ctypes.data, tokens)
        assert np.abs(out - want).max() <= 2e-5 * np.abs(want).max()


@pytest.mark.parametrize(
    "formats", [("Q4_1",) * 3, ("Q4_K", "Q4_K", "Q6_K"), ("F16", "Q8_0", "BF16"), ("Q8_0", "F32", "Q4_0")]
)
def test_int8_block_is_close_in_place_and_independent_of_the_batch(
    pool: _native.Pool, formats: tuple[str, str, str]
) -> None:
    block, expected = make(pool, formats, 256, 512, "silu", False)
    x = rows(150, 256)
    want = expected(x)
    single = x[149:].copy()
    block.forward(x.ctypes.data, x.ctypes.data, 150)
    assert np.sqrt(((x - want) ** 2).mean()) <= 0.03 * np.sqrt((want**2).mean())
    block.forward(single.ctypes.data, single.ctypes.data, 1)
    np.testing.assert_array_equal(single, x[149:])


def test_without_residual(pool: _native.Pool) -> None:
    block, expected = make(pool, ("Q8_0",) * 3, 64, 96, "silu", True, residual=False)
    x = rows(3, 64)
    out = np.empty_like(x)
    block.forward(x.ctypes.data, out.ctypes.data, 3)
    np.testing.assert_allclose(out, expected(x, residual=False), atol=1e-5, rtol=1e-4)


def test_odd_widths_of_float_weights(pool: _native.Pool) -> None:
    block, expected = make(pool, ("F32", "F16", "BF16"), 50, 37, "gelu_tanh", True)
    x = rows(5, 50)
    want = expected(x)
    block.forward(x.ctypes.data, x.ctypes.data, 5)
    assert np.abs(x - want).max() <= 2e-5 * np.abs(want).max()


def test_activations_survive_extreme_values(pool: _native.Pool) -> None:
    eye = np.eye(32, dtype=np.float32).view(np.uint8)
    ones = np.ones((32, 32), np.float32) / 32
    w = _native.PackedMatrix.pack(pool, "F32", 32, 32, eye)
    up = _native.PackedMatrix.pack(pool, "F32", 32, 32, ones.view(np.uint8))
    x = np.concatenate([np.linspace(-200, 200, 31), [1e4]]).astype(np.float32)[None]
    for name, function in ACTIVATIONS.items():
        out = np.empty_like(x)
        _native.MLPBlock(pool, w, up, w, activation=name, residual=False, exact=True).forward(
            x.ctypes.data, out.ctypes.data, 1
        )
        want = function(torch.from_numpy(x).double()).numpy() * x.astype(np.float64).mean()
        np.testing.assert_allclose(out, want, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("width", [1, 15, 16, 50, 576])
def test_rms_norm(pool: _native.Pool, width: int) -> None:
    x, w = rows(5, width), rows(1, width)[0]
    out = np.empty_like(x)
    _native.rms_norm(pool, x.ctypes.data, w, 1e-6, out.ctypes.data, 5)
    h = x.astype(np.float64)
    np.testing.assert_allclose(out, h / np.sqrt((h**2).mean(-1, keepdims=True) + 1e-6) * w, rtol=2e-6, atol=1e-6)


def test_shapes_and_names_that_do_not_fit_are_refused() -> None:
    pool = _native.Pool(1)
    a = _native.PackedMatrix.pack(pool, "F32", 8, 4, np.zeros((8, 16), np.uint8))
    b = _native.PackedMatrix.pack(pool, "F32", 4, 8, np.zeros((4, 32), np.uint8))
    _native.MLPBlock(pool, a, a, b)
    with pytest.raises(ValueError, match="same shape"):
        _native.MLPBlock(pool, a, b, b)
    with pytest.raises(ValueError, match="down"):
        _native.MLPBlock(pool, a, a, a)
    with pytest.raises(ValueError, match="activation"):
        _native.MLPBlock(pool, a, a, b, activation="swish")
    with pytest.raises(ValueError, match="norm"):
        _native.MLPBlock(pool, a, a, b, np.ones(5, np.float32))
