"""Router and experts, run by the OpenCL CPU device, against the reference operators in float64."""

from __future__ import annotations

import gguf
import pytest
import torch
from ktcore_triton.affine import affine_weight
from ktcore_xpu.sycl.experts import route, routed_experts
from ktcore_xpu.sycl.launcher import Launcher

from ktcore.errors import BackendError
from ktcore.ops.moe import ExpertsSpec, RouterSpec
from ktcore.ops.moe import route as reference_route
from ktcore.ops.moe import routed_experts as reference_experts

from .blocks import random_rows

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
def test_the_choice_is_the_references(launcher: Launcher, spec: RouterSpec) -> None:
    torch.manual_seed(spec.experts)
    logits = torch.randn(9, spec.experts) * 2
    bias = torch.randn(spec.experts) * 0.2 if spec.choice_bias else None
    ids, weights = route(launcher, logits, spec, bias)
    expected_ids, expected = reference_route(logits, spec, bias)
    assert torch.equal(ids, expected_ids)
    torch.testing.assert_close(weights, expected, rtol=2e-5, atol=1e-7)


def test_of_equal_scores_the_lower_id_is_chosen(launcher: Launcher) -> None:
    ids, weights = route(launcher, torch.zeros(2, 60), ROUTERS[1], None)
    assert ids.tolist() == [[0, 1, 2, 3]] * 2
    torch.testing.assert_close(weights, torch.full((2, 4), 1 / 60))


NOTHING_LEFT = (
    (RouterSpec(8, 60, 8, "F32", "sigmoid", True, renormalise=True), (3, 17, 58)),
    (RouterSpec(8, 64, 8, "F32", "sigmoid", True, 8, 4, "top2_sum", True), (9, 10, 41)),
    (RouterSpec(8, 64, 8, "F32", "sigmoid", True, 8, 4, "max", True), (9, 63)),
    (RouterSpec(8, 64, 10, "F32", "sigmoid", True, 8, 1, "top2_sum", True), tuple(range(64))),
)


@pytest.mark.parametrize(("spec", "alive"), NOTHING_LEFT, ids=["experts", "groups", "groups at zero", "few kept"])
def test_where_only_minus_infinity_is_left_no_expert_is_chosen_twice(
    launcher: Launcher, spec: RouterSpec, alive: tuple[int, ...]
) -> None:
    torch.manual_seed(1)
    logits, bias = torch.randn(9, spec.experts), torch.full((spec.experts,), -torch.inf)
    bias[list(alive)] = torch.randn(len(alive)) * 0.2
    ids, weights = route(launcher, logits, spec, bias)
    expected_ids, expected = reference_route(logits, spec, bias)
    assert torch.equal(ids, expected_ids)
    torch.testing.assert_close(weights, expected, rtol=2e-5, atol=1e-7)


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_logits_of_minus_infinity_and_rows_that_are_no_numbers(launcher: Launcher, score: str) -> None:
    spec = RouterSpec(8, 20, 4, "F32", score, on_logits=True)  # type: ignore[arg-type]
    logits = torch.full((3, 20), -torch.inf)
    logits[0, 11] = logits[1, 2] = 1.0
    logits[2] = torch.nan
    ids, weights = route(launcher, logits, spec, None)
    expected_ids, expected = reference_route(logits, spec, None)
    assert torch.equal(ids, expected_ids)
    assert weights[2].isnan().all()
    torch.testing.assert_close(weights[:2], expected[:2])


def check(launcher: Launcher, experts: int, name: str, down: str, ids: torch.Tensor) -> None:
    torch.manual_seed(ids.shape[0])
    hidden, intermediate = 256, 512
    x, weights = torch.randn(ids.shape[0], hidden) / 64, torch.rand(ids.shape)
    packed, values = [], []
    shapes = ((name, intermediate, hidden), (name, intermediate, hidden), (down, hidden, intermediate))
    for seed, (fmt, rows, cols) in enumerate(shapes):
        raw = random_rows(fmt, experts * rows, cols, seed)
        packed.append(affine_weight(fmt, raw, experts * rows, cols))
        found = gguf.quants.dequantize(raw, gguf.GGMLQuantizationType[fmt])
        values.append(torch.from_numpy(found).double().view(experts, rows, cols))
    spec = ExpertsSpec(hidden, intermediate, experts, ids.shape[1], "silu", name, name, down)
    expected = reference_experts(x.double(), ids, weights.double(), *values, spec)
    found = routed_experts(launcher, x, ids, weights, *packed, experts)
    assert float((found - expected).norm()) <= 3e-6 * float(expected.norm())


@pytest.mark.parametrize(("name", "down"), [("Q4_K", "Q6_K"), ("Q4_0", "Q5_1"), ("Q8_0", "Q8_0")])
def test_experts_of_many_formats(launcher: Launcher, name: str, down: str) -> None:
    torch.manual_seed(1)
    check(launcher, 5, name, down, torch.stack([torch.randperm(5)[:2] for _ in range(5)]))


@pytest.mark.parametrize(
    "ids",
    [
        torch.tensor([[2, 0]]),
        torch.full((20, 1), 2),
        torch.tensor([[-1, 1], [-1, -1], [2, -1]]),
        torch.full((2, 2), -1),
    ],
    ids=["one token", "all to one", "some elsewhere", "all elsewhere"],
)
def test_ugly_choices(launcher: Launcher, ids: torch.Tensor) -> None:
    check(launcher, 3, "Q4_K", "Q6_K", ids)


def test_what_does_not_fit_is_refused(launcher: Launcher) -> None:
    with pytest.raises(BackendError, match="do not fit a router of 4 of 60"):
        route(launcher, torch.zeros(1, 61), ROUTERS[1], None)
    one = affine_weight("Q4_0", random_rows("Q4_0", 64, 64), 64, 64)
    other = affine_weight("Q8_0", random_rows("Q8_0", 64, 64), 64, 64)
    ids, weights = torch.zeros(1, 1, dtype=torch.int64), torch.ones(1, 1)
    with pytest.raises(BackendError, match="same shape and format"):
        routed_experts(launcher, torch.zeros(1, 64), ids, weights, one, other, one, 1)
    with pytest.raises(BackendError, match="weights of 2 experts"):
        routed_experts(launcher, torch.zeros(1, 64), ids, weights, one, one, one, 2)
