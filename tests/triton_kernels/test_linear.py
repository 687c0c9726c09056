"""The linear kernel in Triton's interpreter against float64 products with the gguf package's values."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
import torch
from ktcore_triton.affine import affine_weight
from ktcore_triton.linear import linear
from ktcore_triton.tuning import LinearTiles

from ktcore.errors import BackendError
from ktcore.weights import dequantize

from .stored import random_rows

FORMATS = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K")
# bfloat16 is multiplied as float32: the interpreter has no bfloat16 arithmetic
ROUNDING = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 6e-3}


def check(
    name: str, tokens: int, rows: int, cols: int, dtype: torch.dtype, dense: bool = True, **options: object
) -> None:
    raw = random_rows(name, rows, cols)
    values = torch.from_numpy(gguf.quants.dequantize(raw, gguf.GGMLQuantizationType[name])).double()
    x = torch.randn(tokens, cols, generator=torch.Generator().manual_seed(tokens)).to(dtype)
    bias = torch.randn(rows)
    compute = torch.float32 if dtype == torch.bfloat16 else None
    weight = affine_weight(name, raw, rows, cols, dense=dense)
    y = linear(x, weight, bias, compute=compute, **options)  # type: ignore[arg-type]
    expected = x.double() @ values.T + bias.double()
    assert y.dtype == dtype
    assert float((y.double() - expected).norm() / expected.norm()) < ROUNDING[dtype]


@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("name", FORMATS)
def test_every_format_is_multiplied(name: str, dense: bool) -> None:
    check(name, 3, 40, 512, torch.float32, dense)


@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize("tokens", [1, 16, 70])
def test_any_number_of_tokens_in_any_type(tokens: int, dtype: torch.dtype) -> None:
    check("Q4_K", tokens, 33, 256, dtype)


@pytest.mark.parametrize(("splits", "cols"), [(2, 512), (3, 1280), (8, 256)])
def test_split_sums_are_put_together(splits: int, cols: int) -> None:
    check("Q6_K", 2, 32, cols, torch.float32, tiles=LinearTiles(16, 32, splits))


def test_a_weight_of_an_odd_number_of_blocks() -> None:
    check("Q4_0", 5, 7, 96, torch.float16)
    check("Q5_1", 5, 7, 96, torch.float16)


@pytest.mark.parametrize(("bits", "group"), [(4, 128), (8, 64)])
def test_integer_groups_with_zero_points(bits: int, group: int) -> None:
    rng = np.random.default_rng(3)
    heads = np.stack((np.full((20, 3), 0x2400), rng.integers(0, 1 << bits, (20, 3))), -1).astype("<u2")
    raw = np.concatenate((heads.view(np.uint8), rng.integers(0, 256, (20, 3, group * bits // 8), dtype=np.uint8)), -1)
    name, cols = f"INT{bits}_G{group}", 3 * group
    values = dequantize(name, raw.reshape(-1), (20, cols)).double()
    x = torch.randn(4, cols)
    y = linear(x, affine_weight(name, raw.reshape(-1), 20, cols))
    assert float((y - x.double() @ values.T).norm() / y.norm()) < ROUNDING[torch.float32]


def test_shapes_that_do_not_fit_are_refused() -> None:
    weight = affine_weight("Q4_0", random_rows("Q4_0", 4, 64), 4, 64)
    with pytest.raises(BackendError, match=r"x \[2, 32\] for a weight \[4, 64\]"):
        linear(torch.zeros(2, 32), weight)
    with pytest.raises(BackendError, match="contiguous"):
        linear(torch.zeros(64, 2).T, weight)
    with pytest.raises(BackendError, match="not in torch"):
        linear(torch.zeros(2, 64, dtype=torch.float64), weight)
    assert linear(torch.zeros(0, 64), weight).shape == (0, 4)
