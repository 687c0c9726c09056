"""Fields of specs that the native kernels do not know yet are refused with a reason, never ignored."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from ktcore_cpu.attention import CpuAttention
from ktcore_cpu.backend import CpuRuntime
from ktcore_cpu.experts import CpuExperts
from ktcore_cpu.moe import CpuMoE
from ktcore_cpu.norm import CpuRMSNorm
from ktcore_cpu.router import CpuRouter

from ktcore.backend import Capabilities, LoadRequest, Supported, Unsupported
from ktcore.backend.handles import answer as judge
from ktcore.errors import BackendError
from ktcore.ops import (
    AttentionSpec,
    ClampedGLU,
    ExpertsSpec,
    KVCacheSpec,
    LinearSpec,
    MLPSpec,
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
        ({"gate": replace(SQUARE, bias=True)}, "gate.bias"),
        ({"post_norm": RMSNormSpec(64, 1e-5, offset=1.0)}, "post_norm.offset"),
        ({"q_norm": NO_WEIGHT, "k_norm": replace(NO_WEIGHT, eps=1e-6)}, "different eps"),
    ],
)
def test_attention(changes: dict[str, Any], words: str) -> None:
    assert isinstance(judge(CpuAttention(), ATTENTION, DEVICE), Supported)
    answer = judge(CpuAttention(), replace(ATTENTION, **changes), DEVICE)
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
    assert isinstance(judge(CpuAttention(), replace(ATTENTION, **changes), DEVICE), Supported)


@pytest.mark.parametrize("changes", [{"choice_bias": True}, {"groups": 2}])
def test_router(changes: dict[str, Any]) -> None:
    for field in ({"logit_bias": True}, {"on_logits": True}):
        assert isinstance(judge(CpuRouter(), replace(ROUTER, **field), DEVICE), Supported)  # type: ignore[arg-type]
    router = replace(ROUTER, on_logits=True, **changes)
    for answer in (judge(CpuRouter(), router, DEVICE), judge(CpuMoE(), MoESpec(64, router, EXPERTS), DEVICE)):
        assert isinstance(answer, Unsupported)
        assert "chosen by logits" in answer.reason


@pytest.mark.parametrize("changes", [{"bias": True}, {"clamped": ClampedGLU(1.7, 7)}, {"weight_on_input": True}])
def test_experts_take(changes: dict[str, Any]) -> None:
    experts = replace(EXPERTS, **changes)
    assert isinstance(judge(CpuExperts(), experts, DEVICE), Supported)
    assert isinstance(judge(CpuMoE(), MoESpec(64, ROUTER, experts, early_router=True), DEVICE), Supported)


def test_shared_experts_beside_a_clamped_activation() -> None:
    spec = MoESpec(64, ROUTER, EXPERTS, MLPSpec(64, 64, "silu", SQUARE, SQUARE, SQUARE))
    assert isinstance(judge(CpuMoE(), spec, DEVICE), Supported)
    clamped = replace(spec, experts=replace(EXPERTS, clamped=ClampedGLU(1.7, 7)))
    assert isinstance(judge(CpuMoE(), clamped, DEVICE), Supported)
    for experts, words in (
        (replace(EXPERTS, activation="relu"), "another activation"),
        (replace(EXPERTS, clamped=ClampedGLU(1.7, 7, after=True)), "after the activation"),
    ):
        answer = judge(CpuMoE(), replace(spec, experts=experts), DEVICE)
        assert isinstance(answer, Unsupported)
        assert words in answer.reason


@pytest.mark.parametrize("shape", [(3, 32), (3, 128), (64, 3), ()], ids=str)
def test_a_norm_over_another_width_is_refused(shape: tuple[int, ...]) -> None:
    """Twice the width would be twice the rows, half of it would read past the end."""
    runtime = CpuRuntime(1)
    module = CpuRMSNorm().load(LoadRequest("norm", RMSNormSpec(64, 1e-5, ""), {}, runtime, DEVICE))
    with pytest.raises(BackendError, match="for a norm over 64"):
        module(torch.ones(shape))
    assert module(torch.full((2, 3, 64), 2.0)).allclose(torch.ones(2, 3, 64))
