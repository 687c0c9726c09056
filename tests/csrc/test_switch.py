"""How panels are read, few tokens or many and from how far ahead: no result depends on it, and it is measured."""

from __future__ import annotations

import numpy as np
import pytest
from ktcore_cpu import _native

from .blocks import random_blocks, run_linear

FORMATS = [f for f, (block, _) in _native.formats().items() if block > 1]
TOKENS = (1, 3, 4, 5, 11, 18)


@pytest.mark.parametrize("format", FORMATS)
def test_results_do_not_depend_on_it(pool: _native.Pool, format: str) -> None:
    w = _native.PackedMatrix.pack(pool, format, 70, 768, random_blocks(format, 70, 768))
    for tokens in TOKENS:
        x = np.random.default_rng(tokens).standard_normal((tokens, 768)).astype(np.float32)
        results = []
        for few in (0, 4, _native.MOST_FEW):
            pool.set_few(format, few)
            results.append(run_linear(pool, w, x))
        assert all((r == results[0]).all() for r in results)


@pytest.mark.parametrize("format", FORMATS)
def test_results_do_not_depend_on_how_far_ahead_lines_are_asked_for(pool: _native.Pool, format: str) -> None:
    w = _native.PackedMatrix.pack(pool, format, 70, 768, random_blocks(format, 70, 768))
    x = np.random.default_rng(0).standard_normal((1, 768)).astype(np.float32)
    results = []
    for ahead in (0, 256, _native.MOST_AHEAD):
        pool.set_ahead(format, ahead)
        results.append(run_linear(pool, w, x))
    assert all((r == results[0]).all() for r in results)


def test_a_measured_distance_is_within_its_range(pool: _native.Pool) -> None:
    before = pool.ahead
    found = {f: pool.measure_ahead(f) for f in ("Q4_0", "Q6_K", "BF16", "TQ1_0")}
    assert all(n % 64 == 0 and 0 <= n <= _native.MOST_AHEAD for n in found.values())
    assert found["BF16"] == before["BF16"], "there is one way"
    assert pool.ahead == before


def test_a_measured_point_is_within_its_range(pool: _native.Pool) -> None:
    before = pool.few
    assert all(0 <= pool.measure_few(f) <= _native.MOST_FEW for f in ("Q4_0", "Q6_K", "IQ2_S", "BF16"))
    assert pool.few == before


def test_impossible_points_are_refused(pool: _native.Pool) -> None:
    with pytest.raises(ValueError, match="few tokens are 0 to 32"):
        pool.set_few("Q4_K", 33)
    with pytest.raises(ValueError, match="few tokens are 0 to 32"):
        pool.set_few("Q4_K", -1)
    with pytest.raises(ValueError, match="Q4_X"):
        pool.set_few("Q4_X", 3)
    for ahead in (-64, 100, _native.MOST_AHEAD + 64):
        with pytest.raises(ValueError, match="0 to 65536, whole cache lines"):
            pool.set_ahead("Q4_K", ahead)
    with pytest.raises(ValueError, match="Q4_X"):
        pool.set_ahead("Q4_X", 0)
