"""Linear kernels, run by the OpenCL CPU device, against float64 products with the gguf package's values."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
import torch
from ktcore_triton.affine import affine_weight
from ktcore_xpu.sycl.launcher import Launcher
from ktcore_xpu.sycl.linear import linear

from ktcore.errors import BackendError
from ktcore.weights import dequantize

from .blocks import random_rows

FORMATS = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K")


def check(launcher: Launcher, name: str, tokens: int, rows: int, cols: int, dtype: torch.dtype = torch.float32) -> None:
    raw = random_rows(name, rows, cols)
    values = torch.from_numpy(gguf.quants.dequantize(raw, gguf.GGMLQuantizationType[name])).double()
    x = torch.randn(tokens, cols, generator=torch.Generator().manual_seed(tokens)).to(dtype)
    bias = torch.randn(rows)
    y = linear(launcher, x, affine_weight(name, raw, rows, cols), bias)
    expected = x.double() @ values.T + bias.double()
    assert y.dtype == torch.float32
    assert float((y - expected).norm() / expected.norm()) < 2e-6


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_is_multiplied(launcher: Launcher, name: str) -> None:
    check(launcher, name, 1, 40, 512)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("tokens", [1, 3, 8, 70])
def test_any_number_of_tokens_in_any_type(launcher: Launcher, tokens: int, dtype: torch.dtype) -> None:
    check(launcher, "Q4_K", tokens, 33, 1280, dtype)


@pytest.mark.parametrize("tokens", [2, 20])
def test_a_weight_of_an_odd_number_of_blocks(launcher: Launcher, tokens: int) -> None:
    check(launcher, "Q4_0", tokens, 7, 96)


@pytest.mark.parametrize("tokens", [1, 17])
@pytest.mark.parametrize(("bits", "group"), [(4, 128), (8, 64)])
def test_integer_groups_with_zero_points(launcher: Launcher, bits: int, group: int, tokens: int) -> None:
    rng = np.random.default_rng(3)
    heads = np.stack((np.full((20, 3), 0x2400), rng.integers(0, 1 << bits, (20, 3))), -1).astype("<u2")
    raw = np.concatenate((heads.view(np.uint8), rng.integers(0, 256, (20, 3, group * bits // 8), dtype=np.uint8)), -1)
    name, cols = f"INT{bits}_G{group}", 3 * group
    values = dequantize(name, raw.reshape(-1), (20, cols)).double()
    x = torch.randn(tokens, cols)
    y = linear(launcher, x, affine_weight(name, raw.reshape(-1), 20, cols))
    expected = x.double() @ values.T
    assert float((y - expected).norm() / expected.norm()) < 2e-6


def test_what_does_not_fit_is_refused(launcher: Launcher) -> None:
    weight = affine_weight("Q4_0", random_rows("Q4_0", 4, 64), 4, 64)
    with pytest.raises(BackendError, match=r"x \[2, 32\] for a weight \[4, 64\]"):
        linear(launcher, torch.zeros(2, 32), weight)
    with pytest.raises(BackendError, match="contiguous"):
        linear(launcher, torch.zeros(64, 2).T, weight)
    with pytest.raises(BackendError, match=r"not torch\.float64"):
        linear(launcher, torch.zeros(2, 64, dtype=torch.float64), weight)
    assert linear(launcher, torch.zeros(0, 64), weight).shape == (0, 4)
