"""Routing and routed experts against transformers' routers and expert modules."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import DeepseekV2Config, DeepseekV3Config, GptOssConfig, Llama4TextConfig, Qwen3MoeConfig
from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2TopkRouter
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3Experts, DeepseekV3TopkRouter
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts, GptOssTopKRouter
from transformers.models.llama4.modeling_llama4 import Llama4TextMoe
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeTopKRouter

from ktcore.ops.mlp import ClampedGLU
from ktcore.ops.moe import ExpertsSpec, RouterSpec, route, routed_experts

HIDDEN = 48
TOKENS = 257


def _dense(ids: torch.Tensor, weights: torch.Tensor, experts: int) -> torch.Tensor:
    """Weights spread over all experts, so that the order of choice does not matter."""
    assert all(len(set(row)) == ids.shape[1] for row in ids.tolist())
    return torch.zeros(ids.shape[0], experts).scatter_(1, ids, weights.float())


def _same(router: torch.nn.Module, spec: RouterSpec, bias: torch.Tensor | None) -> None:
    x = torch.randn(TOKENS, HIDDEN, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        for parameter in router.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3)))
        logits, weights, ids = router(x)
        ours = route(logits, spec, bias)
    expected = _dense(ids, weights, spec.experts)
    torch.testing.assert_close(_dense(*ours, spec.experts), expected, atol=1e-6, rtol=1e-5)


def _spec(experts: int, top_k: int, **fields: Any) -> RouterSpec:
    return RouterSpec(HIDDEN, experts, top_k, "F32", **fields)


@pytest.mark.parametrize(
    ("experts", "top_k", "groups", "kept"), [(256, 8, 8, 4), (384, 8, 1, 1), (64, 6, 1, 1), (16, 4, 4, 2)]
)
@pytest.mark.parametrize("renormalise", [True, False])
def test_sigmoid_with_groups_matches_deepseek_v3(
    experts: int, top_k: int, groups: int, kept: int, renormalise: bool
) -> None:
    config = DeepseekV3Config(
        hidden_size=HIDDEN,
        n_routed_experts=experts,
        num_experts_per_tok=top_k,
        n_group=groups,
        topk_group=kept,
        norm_topk_prob=renormalise,
        routed_scaling_factor=2.5,
    )
    router = DeepseekV3TopkRouter(config)
    # big and partly negative: a filter that masks with 0 instead of -inf would choose masked experts
    bias = torch.randn(experts, generator=torch.Generator().manual_seed(4)) - 1.0
    router.e_score_correction_bias.copy_(bias)
    spec = _spec(
        experts,
        top_k,
        score="sigmoid",
        choice_bias=True,
        groups=groups,
        groups_kept=kept,
        group_score="top2_sum",
        renormalise=renormalise,
        renorm_eps=1e-20,
        scale=2.5,
    )
    _same(router, spec, bias)


@pytest.mark.parametrize(
    ("method", "experts", "top_k", "groups", "kept"),
    [("greedy", 64, 6, 1, 1), ("group_limited_greedy", 160, 6, 8, 3), ("group_limited_greedy", 16, 4, 4, 2)],
)
def test_softmax_with_groups_matches_deepseek_v2(method: str, experts: int, top_k: int, groups: int, kept: int) -> None:
    config = DeepseekV2Config(
        hidden_size=HIDDEN,
        n_routed_experts=experts,
        num_experts_per_tok=top_k,
        n_group=groups,
        topk_group=kept,
        topk_method=method,
        routed_scaling_factor=16.0,
        num_attention_heads=4,
    )
    spec = _spec(experts, top_k, groups=groups, groups_kept=kept, group_score="max", scale=16.0)
    _same(DeepseekV2TopkRouter(config), spec, None)


@pytest.mark.parametrize(("experts", "top_k"), [(128, 8), (16, 4), (8, 8), (8, 1)])
@pytest.mark.parametrize("renormalise", [True, False])
def test_softmax_matches_qwen3_moe(experts: int, top_k: int, renormalise: bool) -> None:
    config = Qwen3MoeConfig(
        hidden_size=HIDDEN, num_experts=experts, num_experts_per_tok=top_k, norm_topk_prob=renormalise
    )
    _same(Qwen3MoeTopKRouter(config), _spec(experts, top_k, renormalise=renormalise), None)


SPEC = ExpertsSpec(HIDDEN, 20, 8, 3, "silu", "F32", "F32", "F32")


@pytest.fixture
def experts() -> DeepseekV3Experts:
    config = DeepseekV3Config(
        hidden_size=HIDDEN, moe_intermediate_size=SPEC.intermediate, n_routed_experts=SPEC.experts
    )
    config._experts_implementation = "eager"
    module = DeepseekV3Experts(config)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.2, generator=torch.Generator().manual_seed(5))
    return module


def _run(module: DeepseekV3Experts, x: torch.Tensor, ids: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    gate, up = module.gate_up_proj.chunk(2, 1)
    with torch.no_grad():
        return routed_experts(x, ids, w, gate, up, module.down_proj, SPEC)


ROUTES = {
    "spread": torch.stack([torch.randperm(8, generator=torch.Generator().manual_seed(i))[:3] for i in range(31)]),
    "all tokens to the same experts": torch.tensor([[7, 0, 3]]).repeat(31, 1),
    "one token": torch.tensor([[2, 6, 1]]),
}


@pytest.mark.parametrize("routes", ROUTES)
def test_routed_experts_match_transformers(routes: str, experts: DeepseekV3Experts) -> None:
    ids = ROUTES[routes]
    x, w = torch.randn(len(ids), HIDDEN), torch.rand(len(ids), 3)
    with torch.no_grad():
        expected = experts(x, ids, w)
    torch.testing.assert_close(_run(experts, x, ids, w), expected, atol=1e-5, rtol=1e-5)


def test_negative_ids_add_nothing(experts: DeepseekV3Experts) -> None:
    ids = ROUTES["spread"].clone()
    x, w = torch.randn(len(ids), HIDDEN), torch.rand(len(ids), 3)
    here, there = ids.clone(), ids.clone()
    here[ids >= 4], there[ids < 4] = -1, -1
    both = _run(experts, x, here, w) + _run(experts, x, there, w)
    torch.testing.assert_close(both, _run(experts, x, ids, w), atol=1e-5, rtol=1e-5)
    assert torch.equal(_run(experts, x, torch.full_like(ids, -1), w), torch.zeros_like(x))


def test_weight_on_input_is_not_weight_on_output(experts: DeepseekV3Experts) -> None:
    ids = ROUTES["spread"][:, :1]
    x, w = torch.randn(len(ids), HIDDEN), torch.rand(len(ids), 1)
    gate, up = experts.gate_up_proj.chunk(2, 1)
    with torch.no_grad():
        ours = routed_experts(x, ids, w, gate, up, experts.down_proj, replace(SPEC, weight_on_input=True))
        expected = experts(x * w, ids, torch.ones_like(w))
        other = experts(x, ids, w)
    torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(ours, other, atol=1e-2)


def test_choice_by_logits_matches_gpt_oss() -> None:
    config = GptOssConfig(hidden_size=HIDDEN, num_local_experts=16, num_experts_per_tok=4, intermediate_size=24)
    router = GptOssTopKRouter(config)
    spec = _spec(16, 4, on_logits=True, logit_bias=True)
    x = torch.randn(TOKENS, HIDDEN, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        for parameter in router.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3)))
        _, weights, ids = router(x)
        ours = route(torch.nn.functional.linear(x, router.weight, router.bias), spec, None)
    torch.testing.assert_close(_dense(*ours, 16), _dense(ids, weights, 16), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("top_k", [1, 3])
def test_a_branch_with_weights_on_the_input_matches_llama4(top_k: int) -> None:
    config = Llama4TextConfig(
        hidden_size=HIDDEN, num_local_experts=6, num_experts_per_tok=top_k, intermediate_size=24, num_hidden_layers=4
    )
    torch.manual_seed(5)
    branch = Llama4TextMoe(config).eval()
    x = torch.randn(50, HIDDEN)
    with torch.no_grad():
        for parameter in branch.parameters():
            parameter.normal_(0, 0.3)
        expected, logits = branch(x)
        ids, weights = route(logits, _spec(6, top_k, score="sigmoid", on_logits=True), None)
        gate, up = branch.experts.gate_up_proj.transpose(1, 2).chunk(2, 1)
        down = branch.experts.down_proj.transpose(1, 2)
        spec = ExpertsSpec(HIDDEN, 24, 6, top_k, "silu", "F32", "F32", "F32", weight_on_input=True)
        ours = routed_experts(x, ids, weights, gate, up, down, spec) + branch.shared_expert(x)
    torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-5)


def test_experts_with_biases_and_clamps_match_gpt_oss() -> None:
    config = GptOssConfig(hidden_size=HIDDEN, num_local_experts=6, num_experts_per_tok=2, intermediate_size=24)
    experts = GptOssExperts(config).eval()
    g = torch.Generator().manual_seed(6)
    x = 3 * torch.randn(50, HIDDEN, generator=g)
    ids = torch.rand(50, 6, generator=g).topk(2).indices
    weights = torch.rand(50, 2, generator=g)
    with torch.no_grad():
        for parameter in experts.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=g))
        expected = experts(x, ids, weights)
        gate, up = (experts.gate_up_proj[:, :, i::2].transpose(1, 2) for i in (0, 1))
        biases = (experts.gate_up_proj_bias[:, ::2], experts.gate_up_proj_bias[:, 1::2], experts.down_proj_bias)
        spec = ExpertsSpec(
            HIDDEN, 24, 6, 2, "silu", "F32", "F32", "F32", bias=True, clamped=ClampedGLU(experts.alpha, experts.limit)
        )
        assert (x @ gate[0].T).max() > 7, "nothing is clamped"
        ours = routed_experts(x, ids, weights, gate, up, experts.down_proj.transpose(1, 2), spec, biases)
    torch.testing.assert_close(ours, expected, atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"score": "sigmoid", "on_logits": True},
        {"groups": 4, "groups_kept": 2},
        {"score": "sigmoid", "groups": 4, "groups_kept": 2, "group_score": "top2_sum"},
    ],
    ids=["scores", "logits", "groups by their best", "groups by two"],
)
def test_of_equal_experts_and_groups_the_lowest_ids_are_chosen(fields: dict[str, Any]) -> None:
    ids, _ = route(torch.zeros(2, 64), _spec(64, 3, **fields), None)
    assert ids.tolist() == [[0, 1, 2]] * 2
    assert ids.is_contiguous()
