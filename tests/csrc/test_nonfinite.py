"""NaN and Inf in one row: that row's result says so, every other row keeps its bits."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from ktcore_cpu import _native

from .blocks import F32, random_blocks, run_linear
from .test_attention import Layer, hidden_rows, ints
from .test_experts import batch, make_bank
from .test_experts import run as run_experts
from .test_mla import Reference
from .test_mla import tokens as latent_rows
from .test_mlp import ACTIVATIONS
from .test_mlp import make as make_mlp

FORMATS = list(_native.formats())
POISONS = [np.nan, -np.nan, np.inf, -np.inf]
IDS = ["nan", "-nan", "inf", "-inf"]


def check(run: Callable[[F32], F32], x: F32, poison: float, row: int, col: int) -> None:
    """run(x) with one poisoned value against run(x) without."""
    clean = run(x)
    assert np.isfinite(clean).all()
    bad = x.copy()
    bad[row, col] = poison
    got = run(bad)
    if np.isnan(poison):
        assert np.isnan(got[row]).all()
    else:
        assert not np.isfinite(got[row]).any()
    others = np.arange(len(x)) != row
    np.testing.assert_array_equal(got[others], clean[others])


@pytest.mark.parametrize("poison", POISONS, ids=IDS)
@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("format", FORMATS)
def test_linear(pool: _native.Pool, isa: str, format: str, exact: bool, poison: float) -> None:
    w = _native.PackedMatrix.pack(pool, format, 40, 256, random_blocks(format, 40, 256))
    for tokens, row, col in ((1, 0, 0), (3, 2, 255), (9 if isa == "scalar" else 21, 4, 100)):
        x = np.random.default_rng(1).standard_normal((tokens, 256)).astype(np.float32)
        check(lambda x: run_linear(pool, w, x, exact=exact), x, poison, row, col)


@pytest.mark.parametrize("poison", POISONS, ids=IDS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("exact", [False, True])
def test_mlp(pool: _native.Pool, activation: str, exact: bool, poison: float) -> None:
    block, _ = make_mlp(pool, ("Q4_K", "Q8_0", "Q6_K"), 256, 256, activation, exact)

    def run(x: F32) -> F32:
        out = np.zeros_like(x)
        block.forward(x.ctypes.data, out.ctypes.data, len(x))
        return out

    x = np.random.default_rng(2).standard_normal((7, 256)).astype(np.float32)
    check(run, x, poison, 3, 17)


@pytest.mark.parametrize("poison", POISONS, ids=IDS)
@pytest.mark.parametrize("exact", [False, True])
def test_experts(pool: _native.Pool, exact: bool, poison: float) -> None:
    bank, _ = make_bank(pool, ("Q4_K", "Q4_K", "Q6_K"), 3, 256, 256)
    block = _native.ExpertsBlock(pool, bank, exact=exact)
    x, ids, weights = batch(9, 256, 3, 2)
    check(lambda x: run_experts(block, x, ids, weights), x, poison, 5, 200)


@pytest.mark.parametrize("poison", POISONS, ids=IDS)
@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
@pytest.mark.parametrize("groups", [1, 4])
def test_router_still_chooses_distinct_experts(pool: _native.Pool, score: str, groups: int, poison: float) -> None:
    raw = np.random.default_rng(3).standard_normal((16, 32)).astype(np.float32)
    weight = _native.PackedMatrix.pack(pool, "F32", 16, 32, raw.view(np.uint8))
    config = {
        "experts": 16, "top_k": 4, "score": score, "bias": None, "groups": groups, "groups_kept": min(groups, 2),
        "group_score": "top2_sum", "renormalise": True, "renorm_eps": 0.0, "scale": 1.0,
    }  # fmt: skip
    block = _native.RouterBlock(pool, weight, config)
    x = np.random.default_rng(4).standard_normal((6, 32)).astype(np.float32)

    def run(x: F32) -> tuple[np.ndarray, F32]:
        ids, weights = np.full((6, 4), -7), np.zeros((6, 4), np.float32)
        block.forward(x.ctypes.data, ids.ctypes.data, weights.ctypes.data, 6)
        return ids, weights

    ids, weights = run(x)
    bad = x.copy()
    bad[2] = poison
    bad_ids, bad_weights = run(bad)
    assert ((bad_ids >= 0) & (bad_ids < 16)).all()
    assert all(len(set(row)) == 4 for row in bad_ids.tolist())
    assert score == "sigmoid" or np.isnan(bad_weights[2]).all()
    others = np.arange(6) != 2
    np.testing.assert_array_equal(bad_ids[others], ids[others])
    np.testing.assert_array_equal(bad_weights[others], weights[others])


@pytest.mark.parametrize("poison", [np.nan, np.inf], ids=["nan", "inf"])
@pytest.mark.parametrize("kv_dtype", ["f32", "f16", "i16"])
@pytest.mark.parametrize("format", ["F32", "Q8_0"])
def test_attention_spoils_one_sequence_from_that_token_on(
    pool: _native.Pool, format: str, kv_dtype: str, poison: float
) -> None:
    layer = Layer(format=format, kv_dtype=kv_dtype).build(pool)
    x = hidden_rows(70 + 3, layer.hidden)
    table = ints([[0, 1, 2], [3, 4, 5]])
    step = _native.Step(ints([*range(70), *range(3)]), ints([0, 70, 73]), ints([70, 3]), table)
    clean = layer.run(x, step)
    assert np.isfinite(clean).all()
    bad = x.copy()
    bad[66, 5] = poison
    got = layer.run(bad, step)
    assert np.isnan(got[66:70]).all()
    np.testing.assert_array_equal(got[70:], clean[70:])
    # Probabilities of zero times NaN: the tokens before it in its block of 64 keys are spoiled too, none further back.
    np.testing.assert_array_equal(got[:64], clean[:64])
    # the next token of each sequence reads what was cached
    more = _native.Step(ints([70, 3]), ints([0, 1, 2]), ints([71, 4]), table)
    after = layer.run(x[:2].copy(), more)
    assert np.isnan(after[0]).all()
    assert np.isfinite(after[1]).all()


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("kv_dtype", ["f16", "i16"])
@pytest.mark.parametrize("counts", [[1, 1], [40, 2], [130, 2]], ids=["decode", "prefill", "long"])
def test_latent_attention_spoils_one_sequence(
    pool: _native.Pool, exact: bool, counts: list[int], kv_dtype: str
) -> None:
    layer = Reference(pool, "aligned", True, "half", exact, "Q8_0")
    clean, got = (layer.cache(20, kv_dtype) for _ in range(2))
    x = latent_rows(sum(counts), 1)
    want = layer.run(x, counts, counts, clean)
    bad = x.copy()
    bad[0, 3] = np.nan
    spoiled = layer.run(bad, counts, counts, got)
    assert np.isnan(spoiled[0]).all()
    np.testing.assert_array_equal(spoiled[counts[0] :], want[counts[0] :])


@pytest.mark.parametrize("size", [1e34, 1e-30, 1e-37, 1e-39, 1e-45, 0.0])
@pytest.mark.parametrize("format", ["Q8_0", "Q4_K"])
def test_the_ends_of_the_range_stay_finite(pool: _native.Pool, format: str, size: float) -> None:
    w = _native.PackedMatrix.pack(pool, format, 32, 256, random_blocks(format, 32, 256))
    x = np.zeros((5, 256), np.float32)
    x[:, ::16] = size
    want = run_linear(pool, w, x, exact=True)
    # Values below 2^-120 may count as zero: 16 of them times weights below 128.
    np.testing.assert_allclose(run_linear(pool, w, x), want, rtol=1e-2, atol=2.0**-120 * 16 * 128)
