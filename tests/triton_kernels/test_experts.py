"""Router and experts in Triton's interpreter against the reference operators on the gguf package's values."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
import torch
from ktcore_triton.affine import affine_weight
from ktcore_triton.experts import Between, route, routed_experts

from ktcore.errors import BackendError
from ktcore.ops.mlp import ClampedGLU
from ktcore.ops.moe import ExpertsSpec, RouterSpec
from ktcore.ops.moe import route as reference_route
from ktcore.ops.moe import routed_experts as reference_experts

from .stored import random_rows

ROUTERS = (
    RouterSpec(8, 128, 8, "F32", renormalise=True),
    RouterSpec(8, 60, 4, "F32"),
    RouterSpec(8, 256, 8, "F32", "sigmoid", True, 8, 4, "top2_sum", True, 1e-20, 2.5),
    RouterSpec(8, 160, 6, "F32", "softmax", False, 8, 3, "max", scale=16.0),
    RouterSpec(8, 32, 4, "F32", on_logits=True),
    RouterSpec(8, 16, 1, "F32", "sigmoid", on_logits=True),
    RouterSpec(8, 64, 6, "F32", "sigmoid", True, renormalise=True),
)


@pytest.mark.parametrize("spec", ROUTERS, ids=lambda s: f"{s.top_k}of{s.experts}-{s.score}-{s.groups}")
def test_the_choice_is_the_references(spec: RouterSpec) -> None:
    torch.manual_seed(spec.experts)
    logits = torch.randn(9, spec.experts) * 2
    bias = torch.randn(spec.experts) * 0.2 if spec.choice_bias else None
    ids, weights = route(logits, spec, bias)
    expected_ids, expected = reference_route(logits, spec, bias)
    assert torch.equal(ids, expected_ids)
    torch.testing.assert_close(weights, expected, rtol=2e-5, atol=1e-7)


def check(tokens: int, experts: int, k: int, name: str, down: str, dtype: torch.dtype, ids: torch.Tensor) -> None:
    torch.manual_seed(tokens)
    hidden, intermediate = 256, 256
    # small, so that results stay within float16
    x, weights = (torch.randn(tokens, hidden) / 64).to(dtype), torch.rand(tokens, k)
    packed, values = [], []
    for seed, (fmt, rows, cols) in enumerate(((name, intermediate, hidden), (name, intermediate, hidden),
                                              (down, hidden, intermediate))):  # fmt: skip
        raw = random_rows(fmt, experts * rows, cols, seed)
        packed.append(affine_weight(fmt, raw, experts * rows, cols, dense=True))
        found = gguf.quants.dequantize(raw, gguf.GGMLQuantizationType[fmt]).astype(np.float64)
        values.append(torch.from_numpy(found).view(experts, rows, cols))
    spec = ExpertsSpec(hidden, intermediate, experts, k, "silu", name, name, down)
    expected = reference_experts(x.double(), ids, weights.double(), *values, spec)
    found = routed_experts(x, ids, weights, *packed, experts, compute=torch.float32)
    assert found.dtype == dtype
    assert float((found - expected).norm()) <= {torch.float32: 5e-6, torch.float16: 2e-3}[dtype] * float(
        expected.norm()
    )


@pytest.mark.parametrize(("name", "down", "dtype"), [("Q4_K", "Q6_K", torch.float16), ("Q4_0", "Q5_1", torch.float32)])
def test_experts_of_many_formats(name: str, down: str, dtype: torch.dtype) -> None:
    torch.manual_seed(1)
    check(5, 5, 2, name, down, dtype, torch.stack([torch.randperm(5)[:2] for _ in range(5)]))


@pytest.mark.parametrize(
    "ids",
    [
        torch.tensor([[2, 0]]),
        torch.full((20, 1), 2),
        torch.tensor([[-1, 1], [-1, -1], [2, -1]]),
        torch.full((2, 2), -1),
    ],
    ids=["one token", "all to one", "some elsewhere", "all elsewhere"],
)  # fmt: skip
def test_ugly_choices(ids: torch.Tensor) -> None:
    check(ids.shape[0], 3, ids.shape[1], "Q4_K", "Q8_0", torch.float32, ids)


@pytest.mark.parametrize(
    ("activation", "clamped", "on_input", "bias"),
    [
        ("silu", ClampedGLU(1.702, 0.5), False, True),
        ("silu", ClampedGLU(1.0, 0.5, 0.0), False, False),
        ("silu", ClampedGLU(1.0, 0.2, 0.0, True), True, True),
        ("silu", None, True, False),
        ("relu", None, True, True),
        ("gelu_tanh", None, False, False),
    ],
    ids=["gpt-oss", "clamped", "clamped after", "on input", "relu", "gelu"],
)  # fmt: skip
def test_activations_biases_and_weights_on_the_input(
    activation: str, clamped: ClampedGLU | None, on_input: bool, bias: bool
) -> None:
    torch.manual_seed(3)
    experts, hidden, intermediate, tokens, k = 3, 128, 64, 4, 2
    spec = ExpertsSpec(hidden, intermediate, experts, k, activation, "Q4_0", "Q4_0", "Q8_0", on_input, bias, clamped)
    packed, values = [], []
    shapes = (("Q4_0", intermediate, hidden), ("Q4_0", intermediate, hidden), ("Q8_0", hidden, intermediate))
    for seed, (fmt, rows, cols) in enumerate(shapes):
        raw = random_rows(fmt, experts * rows, cols, seed)
        packed.append(affine_weight(fmt, raw, experts * rows, cols))
        found = gguf.quants.dequantize(raw, gguf.GGMLQuantizationType[fmt]).astype(np.float64)
        values.append(torch.from_numpy(found).view(experts, rows, cols))
    biases = tuple(torch.randn(experts, n) for n in (intermediate, intermediate, hidden)) if bias else None
    x, weights = torch.randn(tokens, hidden), torch.rand(tokens, k)
    ids = torch.stack([torch.randperm(experts)[:k] for _ in range(tokens)])
    doubles = None if biases is None else tuple(b.double() for b in biases)
    expected = reference_experts(x.double(), ids, weights.double(), *values, spec, doubles)
    around = Between(activation, clamped, on_input, biases)
    found = routed_experts(x, ids, weights, *packed, experts, between=around)
    assert float((found - expected).norm()) <= 5e-6 * float(expected.norm())


@pytest.mark.parametrize(
    "between",
    [
        Between("silu", ClampedGLU(1.702, 7.0)),
        Between("silu", ClampedGLU(1.0, 7.0, 0.0, True)),
        Between("relu"),
        Between("gelu_tanh"),
    ],
)
def test_nan_stays_with_its_token(between: Between) -> None:
    torch.manual_seed(4)
    shapes = ((64, 128), (64, 128), (128, 64))
    packed = [affine_weight("Q4_0", random_rows("Q4_0", 2 * r, c, i), 2 * r, c) for i, (r, c) in enumerate(shapes)]
    x, ids, weights = torch.randn(3, 128), torch.tensor([[0, 1]] * 3), torch.rand(3, 2)
    clean = routed_experts(x, ids, weights, *packed, 2, between=between)
    x[1, 5] = float("nan")
    found = routed_experts(x, ids, weights, *packed, 2, between=between)
    assert found[1].isnan().all()
    assert torch.equal(found[[0, 2]], clean[[0, 2]])


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(BackendError, match="do not fit a router of 4 of 60"):
        route(torch.zeros(1, 61), ROUTERS[1], None)
    one = affine_weight("Q4_0", random_rows("Q4_0", 64, 64), 64, 64)
    other = affine_weight("Q8_0", random_rows("Q8_0", 64, 64), 64, 64)
    ids, weights = torch.zeros(1, 1, dtype=torch.int64), torch.ones(1, 1)
    with pytest.raises(BackendError, match="same shape and format"):
        routed_experts(torch.zeros(1, 64), ids, weights, one, other, one, 1)
    with pytest.raises(BackendError, match="clamped GLU, not tanh"):
        routed_experts(torch.zeros(1, 64), ids, weights, one, one, one, 1, between=Between("tanh"))
    with pytest.raises(BackendError, match="biases"):
        three = (torch.zeros(64), torch.zeros(64), torch.zeros(63))
        routed_experts(torch.zeros(1, 64), ids, weights, one, one, one, 1, between=Between(biases=three))
    with pytest.raises(BackendError, match="weights of 2 experts"):
        routed_experts(torch.zeros(1, 64), ids, weights, one, one, one, 2)
