"""FP8 weights in the affine layout against torch's own e4m3fn numbers, in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from ktcore_triton.affine import affine_weight
from ktcore_triton.experts import routed_experts
from ktcore_triton.linear import linear

from ktcore.ops.moe import ExpertsSpec
from ktcore.ops.moe import routed_experts as reference_experts
from ktcore.weights.groups import pack_f8

FORMAT = "F8_E4M3_G128"


def stored(rows: int, cols: int) -> tuple[np.ndarray, torch.Tensor]:
    """Bytes of rows of all codes but NaN, with a scale a row and 128 columns, and their values in float64."""
    codes = torch.randint(0, 256, (rows, cols), dtype=torch.uint8)
    codes[(codes & 127) == 127] = 0x80
    scales = torch.rand(rows, cols // 128) / 256
    values = codes.view(torch.float8_e4m3fn).double() * scales.double().repeat_interleave(128, 1)
    return pack_f8(codes.numpy(), scales.numpy()), values


@pytest.mark.parametrize(
    ("tokens", "dtype", "bound"), [(1, torch.float32, 2e-6), (20, torch.float16, 3e-3)], ids=["one", "many"]
)
def test_linear(tokens: int, dtype: torch.dtype, bound: float) -> None:
    torch.manual_seed(tokens)
    raw, values = stored(72, 256)
    x, bias = torch.randn(tokens, 256).to(dtype), torch.randn(72)
    weight = affine_weight(FORMAT, raw, 72, 256)
    expected = x.double() @ values.T + bias.double()
    found = linear(x, weight, bias)
    assert found.dtype == dtype
    assert float((found - expected).norm() / expected.norm()) < bound
    torch.testing.assert_close(weight.values().double(), values, rtol=1e-7, atol=0)


def test_every_code_is_torchs_number() -> None:
    codes = torch.arange(256, dtype=torch.uint8)
    codes[[127, 255]] = 0
    raw = pack_f8(codes.numpy().reshape(2, 128), np.ones((2, 1), np.float32))
    found = linear(torch.eye(128), affine_weight(FORMAT, raw, 2, 128))
    assert torch.equal(found.T, codes.view(torch.float8_e4m3fn).float().view(2, 128))


def test_experts() -> None:
    torch.manual_seed(0)
    experts, hidden, intermediate = 2, 128, 128
    raws, values = zip(*(stored(experts * 128, 128) for _ in range(3)), strict=True)
    packed = [affine_weight(FORMAT, raw, experts * 128, 128) for raw in raws]
    x, weights, ids = torch.randn(3, hidden), torch.rand(3, 1), torch.tensor([[0], [1], [1]])
    spec = ExpertsSpec(hidden, intermediate, experts, 1, "silu", FORMAT, FORMAT, FORMAT)
    expected = reference_experts(x.double(), ids, weights.double(), *(v.view(experts, 128, 128) for v in values), spec)
    found = routed_experts(x, ids, weights, *packed, experts)
    assert float((found - expected).norm() / expected.norm()) < 5e-6
