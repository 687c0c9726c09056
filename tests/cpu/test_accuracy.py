"""What 8-bit activations cost a layer of experts, beside what ggml's cost, both against fp64 on the same weights."""

from __future__ import annotations

import numpy as np
import pytest
from ktcore_cpu import ExpertLayer, ExpertPool, _native
from ktcore_cpu.bench_parts import random_blocks

from ktcore.weights.formats import dequantize

EXPERTS, HIDDEN, WIDTH, TOP_K, TOKENS = 3, 1024, 512, 2, 24
FLOATS = {"F32", "F16", "BF16", "F8_E4M3_G128", "F8_E4M3_G32"}
# those of `packing: fast` hold the same values in another order
FORMATS = sorted(name for name in set(_native.formats()) - FLOATS if not name.endswith("_FAST"))
BY_32 = {"Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "IQ4_NL", "MXFP4"}
"""ggml multiplies these with Q8_0 or Q8_1 activations, of 32 values, and all others with Q8_K's 256."""


def q8_k(x: np.ndarray) -> np.ndarray:
    """x as ggml's quantize_row_q8_K leaves it: int8, one float scale for 256 values, the largest becoming -127."""
    blocks = x.reshape(-1, 256)
    most = np.take_along_axis(blocks, np.abs(blocks).argmax(1)[:, None], 1)
    inverse = np.where(most == 0, 0, -127 / np.where(most == 0, 1, most))
    codes = np.minimum(127, np.rint(inverse * blocks))
    return (codes * np.where(inverse == 0, 0, 1 / np.where(inverse == 0, 1, inverse))).reshape(x.shape)


def q8_0(x: np.ndarray) -> np.ndarray:
    """x as ggml's quantize_row_q8_0 leaves it: int8, one float16 scale for 32 values."""
    blocks = x.reshape(-1, 32)
    scale = np.abs(blocks).max(1, keepdims=True) / 127
    codes = np.rint(blocks * np.where(scale == 0, 0, 1 / np.where(scale == 0, 1, scale)))
    return (codes * scale.astype(np.float16).astype(np.float64)).reshape(x.shape)


def whole_layer(weights, x, ids, scales, rounded=lambda v: v):  # type: ignore[no-untyped-def]
    """The layer in float64, with both products' inputs `rounded`."""
    gate, up, down = weights
    out = np.zeros(x.shape)
    x = rounded(x)
    for t, chosen in enumerate(ids):
        for e, scale in zip(chosen, scales[t], strict=True):
            g = gate[e] @ x[t]
            out[t] += scale * (down[e] @ rounded(g / (1 + np.exp(-g)) * (up[e] @ x[t])))
    return out


def relative(got: np.ndarray, want: np.ndarray) -> float:
    return float(np.linalg.norm(got - want) / np.linalg.norm(want))


@pytest.fixture(scope="module")
def pool() -> ExpertPool:
    return ExpertPool(2)


@pytest.mark.parametrize("fmt", FORMATS)
def test_no_worse_than_ggml_and_far_better_with_outliers(pool: ExpertPool, fmt: str) -> None:
    rng = np.random.default_rng(5)
    shapes = ((WIDTH, HIDDEN), (WIDTH, HIDDEN), (HIDDEN, WIDTH))
    raw = [[random_blocks(fmt, shape, rng) for _ in range(EXPERTS)] for shape in shapes]
    weights = [
        np.stack([dequantize(fmt, r, shape).double().numpy() for r in one])
        for one, shape in zip(raw, shapes, strict=True)
    ]
    layer = ExpertLayer.from_experts(
        zip(*raw, strict=True), experts=EXPERTS, hidden=HIDDEN, intermediate=WIDTH, formats=fmt, pool=pool
    )
    ids = np.stack([rng.permutation(EXPERTS)[:TOP_K] for _ in range(TOKENS)])
    scales = rng.random((TOKENS, TOP_K)).astype(np.float32)
    plain = rng.standard_normal((TOKENS, HIDDEN)).astype(np.float32)
    spiked = plain.copy()
    spiked[:, ::97] *= 8

    errors = {}
    for name, x in (("gaussian", plain), ("outliers", spiked)):
        exact = whole_layer(weights, x.astype(np.float64), ids, scales)
        errors[name] = relative(layer(x, ids, scales), exact)
        errors[name + " q8_k"] = relative(whole_layer(weights, x.astype(np.float64), ids, scales, q8_k), exact)
        errors[name + " q8_0"] = relative(whole_layer(weights, x.astype(np.float64), ids, scales, q8_0), exact)
    # the emulation does what 8 bits must: a scheme without any error would prove nothing
    assert 0.005 < errors["gaussian q8_k"] < 0.03, errors
    assert errors["gaussian"] <= errors["gaussian q8_k"], errors
    assert errors["outliers"] <= 0.6 * errors["outliers q8_k"], errors
    if fmt in BY_32:
        assert errors["gaussian"] <= errors["gaussian q8_0"], errors
        assert errors["outliers"] <= 0.9 * errors["outliers q8_0"], errors
