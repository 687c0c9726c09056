"""Fields of specs that the native kernels do not know yet are refused with a reason, never ignored."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from ktcore_cpu.attention import CpuAttention
from ktcore_cpu.experts import CpuExperts
from ktcore_cpu.moe import CpuMoE
from ktcore_cpu.router import CpuRouter

from ktcore.backend import Capabilities, Supported, Unsupported
from ktcore.ops import (
    AttentionSpec,
    ClampedGLU,
    ExpertsSpec,
    KVCacheSpec,
    LinearSpec,
    MoESpec,
    RMSNormSpec,
    RouterSpec,
    Temperature,
)

DEVICE = Capabilities("cpu", "host")
SQUARE = LinearSpec(64, 64, "F32")
CACHE = KVCacheSpec("gqa", 4, 4, 16, 16)
ATTENTION = AttentionSpec(64, 4, 4, 16, 0.25, SQUARE, SQUARE, SQUARE, SQUARE, CACHE)
EXPERTS = ExpertsSpec(64, 96, 8, 3, "silu", "F32", "F32", "F32")
ROUTER = RouterSpec(64, 8, 3, "F32")
NO_WEIGHT = RMSNormSpec(16, 1e-5, "")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"gate": replace(SQUARE, bias=True)}, "gate with a bias"),
        ({"post_norm": RMSNormSpec(64, 1e-5, offset=1.0)}, "zero-centred"),
        ({"q_norm": NO_WEIGHT, "k_norm": replace(NO_WEIGHT, eps=1e-6)}, "different eps"),
        ({"cache": replace(CACHE, value_dim=32)}, "different width"),
    ],
)
def test_attention(changes: dict[str, Any], words: str) -> None:
    assert isinstance(CpuAttention().supports(ATTENTION, DEVICE), Supported)
    answer = CpuAttention().supports(replace(ATTENTION, **changes), DEVICE)
    assert isinstance(answer, Unsupported)
    assert words in answer.reason


@pytest.mark.parametrize(
    "changes",
    [
        {"gate": SQUARE},
        {"sinks": True},
        {"temperature": Temperature(0.1, 64)},
        {"norm_after_rope": True},
        {"cache": replace(CACHE, chunk=16)},
        {"q_norm": NO_WEIGHT, "k_norm": NO_WEIGHT},
        {"norm": RMSNormSpec(64, 1e-5, offset=1.0)},
    ],
)
def test_attention_takes(changes: dict[str, Any]) -> None:
    assert isinstance(CpuAttention().supports(replace(ATTENTION, **changes), DEVICE), Supported)


@pytest.mark.parametrize(("changes", "words"), [({"logit_bias": True}, "bias"), ({"on_logits": True}, "logits")])
def test_router(changes: dict[str, Any], words: str) -> None:
    router = replace(ROUTER, **changes)
    for answer in (
        CpuRouter().supports(router, DEVICE),
        CpuMoE().supports(MoESpec(64, router, EXPERTS), DEVICE),
    ):
        assert isinstance(answer, Unsupported)
        assert words in answer.reason


@pytest.mark.parametrize(("changes", "words"), [({"bias": True}, "biases"), ({"clamped": ClampedGLU(1.7, 7)}, "clamp")])
def test_experts(changes: dict[str, Any], words: str) -> None:
    experts = replace(EXPERTS, **changes)
    for answer in (
        CpuExperts().supports(experts, DEVICE),
        CpuMoE().supports(MoESpec(64, ROUTER, experts), DEVICE),
    ):
        assert isinstance(answer, Unsupported)
        assert words in answer.reason


def test_a_branch_whose_router_runs_before_attention() -> None:
    assert isinstance(CpuMoE().supports(MoESpec(64, ROUTER, EXPERTS), DEVICE), Supported)
    assert isinstance(CpuMoE().supports(MoESpec(64, ROUTER, EXPERTS, early_router=True), DEVICE), Unsupported)
