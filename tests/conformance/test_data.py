"""Random weights are valid, of the asked size, different from block to block; quantisation rounds as it says."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ktcore.conformance.data.batches import batches, scattered
from ktcore.conformance.data.blocks import FORMATS, random_weight
from ktcore.conformance.truth.arithmetic import quantised
from ktcore.weights import dequantize


@pytest.mark.parametrize("fmt", FORMATS)
def test_random_weights_are_finite_and_of_the_asked_size(fmt: str) -> None:
    raw = random_weight(fmt, (32, 512), 0.05, np.random.default_rng(1))
    values = dequantize(fmt, raw, (32, 512))
    assert bool(values.isfinite().all())
    assert 0.02 < float(values.std()) < 0.12
    assert abs(float(values.mean())) < 0.02
    rows = values.reshape(64, 256).std(1)
    assert float(rows.max() / rows.min()) > 1.01


def test_the_same_generator_gives_the_same_bytes() -> None:
    first, second, other = (random_weight("Q4_K", (4, 256), 1.0, np.random.default_rng(s)) for s in (1, 1, 2))
    assert np.array_equal(first, second)
    assert not np.array_equal(first, other)


def test_quantisation_has_a_scale_for_each_group() -> None:
    x = torch.tensor([[1.0, 0.004, 100.0, 0.4]])
    assert torch.allclose(quantised(x, "int8/row"), torch.tensor([[1.0, 0.0, 127.0, 1.0]]) * 100 / 127)
    two = quantised(x, "int8/2")
    assert two[0, 0] == 1.0
    assert two[0, 1] == pytest.approx(1 / 127)
    assert two[0, 3] == pytest.approx(100 / 127)
    assert torch.equal(quantised(torch.zeros(2, 3), "int8/2"), torch.zeros(2, 3))
    assert float((quantised(x, "float8_e4m3fn/row") - x).abs().max()) < 3


def test_pages_are_scattered_and_belong_to_one_sequence() -> None:
    plan = scattered(((20, 0, 5), (1, 33, 1)), 16, np.random.default_rng(0))
    used = [page for table in plan.tables for page in table]
    assert len(used) == len(set(used)) == 2 + 3 + 1
    assert plan.pages == len(used) + 3
    (first, rows), (second, _) = batches(plan)
    assert [i for i, _ in rows] == [0, 2]
    assert (first.context_lens, second.context_lens) == ((20, 5), (21, 33, 6))
    assert second.positions.tolist() == [20, *range(33), 5]
    assert first.block_table[1].tolist()[1:] == [-1] * (first.block_table.shape[1] - 1)
