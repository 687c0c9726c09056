"""What reference implementations declare, and their refusals."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from ktcore.backend.host import HostRuntime
from ktcore.backend.implementation import LoadRequest, Supported, Unsupported
from ktcore.backend.reference import reference_implementations
from ktcore.errors import BackendError
from ktcore.ops import (
    EmbeddingSpec,
    ExpertsSpec,
    KVCacheSpec,
    LinearSpec,
    MLASpec,
    RMSNormSpec,
    RopeSpec,
    RouterSpec,
    SamplingParams,
    SamplingSpec,
    Spec,
)
from ktcore.ops import __all__ as ops_names

IMPLEMENTATIONS = {i.id: i for i in reference_implementations()}
RUNTIME = HostRuntime()


def test_every_operator_has_a_reference() -> None:
    import ktcore.ops

    specs = {getattr(ktcore.ops, n) for n in ops_names if n.endswith("Spec") and n != "Spec"}
    assert {i.spec_type for i in IMPLEMENTATIONS.values()} == specs
    assert all(i.id == f"reference.{i.spec_type.op}" and not i.fused for i in IMPLEMENTATIONS.values())


@pytest.mark.parametrize(
    ("spec", "size"),
    [
        (EmbeddingSpec(10, 4, "Q8_0"), 160),
        (LinearSpec(32, 5, "Q4_0"), 640),
        (LinearSpec(32, 5, "Q4_0", bias=True), 660),
        (RMSNormSpec(7, 1e-6), 28),
        (RouterSpec(6, 4, 2, "F32", choice_bias=True), 112),
        (ExpertsSpec(32, 64, 3, 2, "silu", "Q4_K", "Q4_K", "Q6_K"), 4 * 3 * 3 * 32 * 64),
        (
            ExpertsSpec(32, 64, 3, 2, "silu", "Q4_K", "Q4_K", "Q6_K", bias=True),
            4 * 3 * (3 * 32 * 64 + 64 + 64 + 32),
        ),
    ],
)
def test_packed_bytes_are_those_of_float32(spec: Spec, size: int) -> None:
    implementation = IMPLEMENTATIONS[f"reference.{spec.op}"]
    assert implementation.packed_bytes(spec, 1) == size
    assert isinstance(implementation.supports(spec, RUNTIME.capabilities()), Supported)


def test_cache_bytes_and_page_sizes() -> None:
    cache = IMPLEMENTATIONS["reference.kv_cache"]
    assert cache.cache_bytes_per_token(KVCacheSpec("gqa", 8, 2, 16, 16)) == 2 * 32 * 4
    assert cache.cache_bytes_per_token(KVCacheSpec("mla", 8, 1, 24, 16)) == 24 * 4
    assert {16, 32, 64, 128, 256} <= set(cache.page_sizes(KVCacheSpec("gqa", 8, 2, 16, 16)))


def test_unknown_formats_and_activations_are_refused() -> None:
    device = RUNTIME.capabilities()
    refused = IMPLEMENTATIONS["reference.linear"].supports(LinearSpec(4, 4, "Q9_Z"), device)
    assert isinstance(refused, Unsupported)
    assert "Q9_Z" in refused.reason
    experts = ExpertsSpec(4, 4, 2, 1, "swish9", "F32", "F32", "F32")
    refused = IMPLEMENTATIONS["reference.experts"].supports(experts, device)
    assert isinstance(refused, Unsupported)
    assert "swish9" in refused.reason
    cache = replace(KVCacheSpec("gqa", 8, 2, 16, 16), kind="ring")  # type: ignore[arg-type]
    assert isinstance(IMPLEMENTATIONS["reference.kv_cache"].supports(cache, device), Unsupported)


def test_plain_latent_attention_names_a_cache_that_it_cannot_read() -> None:
    linear, norm = LinearSpec(8, 8, "F32"), RMSNormSpec(8, 1e-6)
    cache, rope = KVCacheSpec("mla", 2, 1, 6, 4), RopeSpec(2, 1e4, "half")
    spec = MLASpec(8, 2, 2, 2, 2, 4, 0.5, linear, norm, linear, cache, "F32", q=linear, rope=rope)
    request = LoadRequest(
        "layers.5.attn", spec, {}, RUNTIME, RUNTIME.capabilities(), {"cache": object()}, {"absorbed": False}
    )
    with pytest.raises(BackendError, match=r"layers\.5\.attn.*absorbed"):
        IMPLEMENTATIONS["reference.mla"].load(request)


def test_sampler_is_greedy_at_temperature_0() -> None:
    request = LoadRequest("sampler", SamplingSpec(5), {}, RUNTIME, RUNTIME.capabilities())
    sampler = IMPLEMENTATIONS["reference.sampling"].load(request)
    assert sampler(torch.tensor([0.0, 3.0, 1.0, 2.9, -1.0]), SamplingParams(temperature=0), [], None) == 1


@pytest.mark.parametrize("offset", [0.0, 1.0])
@pytest.mark.parametrize("weighted", [False, True])
def test_the_norm_is_torchs_with_the_weight_that_the_spec_means(weighted: bool, offset: float) -> None:
    x, weight = torch.randn(3, 7), torch.randn(7)
    held: dict[str, Any] = {"weight": SimpleNamespace(tensor=lambda: weight)} if weighted else {}
    spec = RMSNormSpec(7, 1e-3, offset=offset)
    norm = IMPLEMENTATIONS["reference.rms_norm"].load(LoadRequest("norm", spec, held, RUNTIME, RUNTIME.capabilities()))
    expected = torch.nn.functional.rms_norm(x, (7,), weight + offset if weighted else None, 1e-3)
    torch.testing.assert_close(norm(x), expected)
    assert IMPLEMENTATIONS["reference.rms_norm"].packed_bytes(spec, 0) == 0
