"""Every format's packed kernels lose no more against fp64 math than rounding activations to 8 bits (or bfloat16) costs.

Limits are relative L2 errors of a whole layer. The scheme of ggml's Q8_K, 8 bits with a scale per 256 values, costs
1.8e-2 on normal inputs and 3.8e-2 with outlier channels; groups of 16 must stay below.
"""

from __future__ import annotations

import numpy as np
import pytest
from ktcore_cpu import _native

from .blocks import F32, random_blocks, reference, run_linear
from .test_experts import error, expected, make_bank, run

FORMATS = list(_native.formats())
FLOATS = ("F32", "F16")  # multiplied as they are
BFLOATS = ("BF16", "F8_E4M3_G128", "F8_E4M3_G32")  # whose inputs are rounded to bfloat16 where the CPU multiplies that
TOKENS, HIDDEN, WIDTH, EXPERTS, TOP_K = 24, 768, 512, 3, 2
MIXED = (
    ("IQ1_S", "IQ1_S", "IQ2_XXS"),
    ("IQ2_XS", "IQ3_S", "Q3_K"),
    ("IQ4_NL", "IQ4_XS", "Q6_K"),
    ("INT4_G128", "INT4_G32", "INT8_G64"),
    ("MXFP4", "MXFP4", "Q8_0"),
    ("F8_E4M3_G128", "F8_E4M3_G128", "BF16"),
    ("F8_E4M3_G128", "IQ1_M", "INT8_G128"),
    ("F32", "MXFP4", "F16"),
    ("TQ1_0", "TQ2_0", "Q2_K"),
)


@pytest.fixture(scope="module")
def inputs() -> dict[bool, F32]:
    """Normal values; and such with outliers, every 97th channel eight times as large, as in real models."""
    x = np.random.default_rng(7).standard_normal((TOKENS, HIDDEN)).astype(np.float32)
    outliers = x.copy()
    outliers[:, ::97] *= 8
    return {False: x, True: outliers}


def limit(formats: tuple[str, ...], outliers: bool, layers: int) -> float:
    """What a linear layer (one rounding of activations) or an expert layer (two) may lose."""
    if all(f in FLOATS for f in formats):
        return 3e-6
    if all(f in FLOATS + BFLOATS for f in formats):
        return 3e-3 if layers == 1 else 4e-3
    return {(1, False): 0.8e-2, (1, True): 1.1e-2, (2, False): 1.25e-2, (2, True): 1.6e-2}[layers, outliers]


@pytest.mark.parametrize("format", FORMATS)
def test_a_linear_layer(format: str, inputs: dict[bool, F32]) -> None:
    pool = _native.Pool(2)
    raw = random_blocks(format, WIDTH, HIDDEN, 3)
    w = _native.PackedMatrix.pack(pool, format, WIDTH, HIDDEN, raw)
    dense = reference(format, raw, WIDTH, HIDDEN).astype(np.float64)
    for outliers, x in inputs.items():
        assert error(run_linear(pool, w, x), x.astype(np.float64) @ dense.T) <= limit((format,), outliers, 1)


@pytest.mark.parametrize("formats", [*((f,) * 3 for f in FORMATS), *MIXED], ids="-".join)
def test_an_expert_layer(formats: tuple[str, str, str], inputs: dict[bool, F32]) -> None:
    pool = _native.Pool(2)
    bank, dense = make_bank(pool, formats, EXPERTS, HIDDEN, WIDTH)
    rng = np.random.default_rng(5)
    ids = np.argsort(rng.random((TOKENS, EXPERTS)), 1)[:, :TOP_K].astype(np.int64)
    weights = rng.random((TOKENS, TOP_K)).astype(np.float32)
    for outliers, x in inputs.items():
        got = run(_native.ExpertsBlock(pool, bank), x, ids, weights)
        assert error(got, expected(x, ids, weights, dense)) <= limit(formats, outliers, 2)
