"""The affine group layout holds the values of the gguf package, bit for bit."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
import torch
from ktcore_triton.affine import affine_bytes, affine_weight, supported
from ktcore_triton.codes import FORMATS

from ktcore.errors import BackendError, CheckpointError
from ktcore.weights import get_format, row_bytes

from .stored import random_rows

GGML = [name for name in FORMATS if name.startswith("Q")]
INTEGER = [name for name in FORMATS if name.startswith("INT")]


@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("cols", [256, 1280])
@pytest.mark.parametrize("name", GGML)
def test_values_are_the_gguf_packages(name: str, cols: int, dense: bool) -> None:
    raw = random_rows(name, 5, cols)
    expected = gguf.quants.dequantize(raw, gguf.GGMLQuantizationType[name])
    np.testing.assert_array_equal(affine_weight(name, raw, 5, cols, dense=dense).values().numpy(), expected)


@pytest.mark.parametrize("name", FORMATS)
def test_dense_weights_take_hardly_more_than_what_is_stored(name: str) -> None:
    rows, cols = 6, 1280
    raw = random_rows(name, rows, cols) if name in GGML else np.zeros((rows, row_bytes(name, cols)), np.uint8)
    weight = affine_weight(name, raw, rows, cols, dense=True)
    assert weight.nbytes <= 1.03 * raw.size + (0.01 * raw.size if name == "Q3_K" else 0)
    assert affine_bytes(name, rows, cols, dense=True) == rows * affine_bytes(name, 1, cols, dense=True)
    if name in GGML:
        assert affine_bytes(name, rows, cols, dense=True) == weight.nbytes


@pytest.mark.parametrize("own_zeros", [False, True])
@pytest.mark.parametrize("name", INTEGER)
def test_values_of_integer_groups_are_code_less_zero_times_scale(name: str, own_zeros: bool) -> None:
    bits, group = int(name[3]), int(name.removesuffix("_ORDERED").split("_G")[1])
    rng = np.random.default_rng(7)
    rows, blocks = 3, 5
    codes = rng.integers(0, 1 << bits, (rows, blocks, group))
    zeros = rng.integers(0, (1 << bits) + 1, (rows, blocks)) if own_zeros else np.full((rows, blocks), 1 << (bits - 1))
    scales = rng.uniform(0.001, 0.1, (rows, blocks)).astype(np.float16)
    head = np.stack((scales.view(np.uint16), zeros.astype(np.uint16)), -1)
    stored = codes if bits == 8 else codes[..., 0::2] | codes[..., 1::2] << 4
    raw = np.concatenate((head.view(np.uint8), stored.astype(np.uint8)), -1).reshape(rows, -1)
    expected = (codes - zeros[..., None]) * scales.astype(np.float64)[..., None]
    weight = affine_weight(name, raw, rows, blocks * group)
    np.testing.assert_array_equal(weight.values().numpy(), expected.reshape(rows, -1))
    assert (weight.offset is None) is not own_zeros


@pytest.mark.parametrize(("name", "bits"), [("Q4_0", 4.5), ("Q8_0", 8.5), ("Q4_1", 5.0), ("Q4_K", 6.0)])
def test_scales_take_16_bits_where_that_is_exact(name: str, bits: float) -> None:
    weight = affine_weight(name, random_rows(name, 4, 512), 4, 512)
    assert weight.nbytes * 8 == bits * weight.rows * weight.cols


def test_odd_numbers_of_small_blocks_are_taken() -> None:
    raw = random_rows("Q4_0", 2, 96)
    weight = affine_weight("Q4_0", raw, 2, 96)
    assert weight.span == 32
    expected = gguf.quants.dequantize(raw, gguf.GGMLQuantizationType.Q4_0)
    assert torch.equal(weight.values(), torch.from_numpy(expected))
    five = random_rows("Q5_1", 2, 96)
    expected = gguf.quants.dequantize(five, gguf.GGMLQuantizationType.Q5_1)
    assert torch.equal(affine_weight("Q5_1", five, 2, 96, dense=True).values(), torch.from_numpy(expected))


def test_what_is_not_affine_is_refused() -> None:
    assert not supported("IQ2_S")
    assert not supported("BF16")
    with pytest.raises(BackendError, match="IQ2_S has no affine group layout"):
        affine_weight("IQ2_S", np.zeros(82, np.uint8), 1, 256)
    with pytest.raises(BackendError, match="takes 18 bytes, got 17"):
        affine_weight("Q4_0", np.zeros(17, np.uint8), 1, 32)
    with pytest.raises(CheckpointError, match="not a multiple"):
        affine_weight("Q4_0", np.zeros(18, np.uint8), 1, 33)
    assert get_format("Q4_0").block_bytes == 18
