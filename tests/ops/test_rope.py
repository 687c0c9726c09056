"""Rotary embedding against transformers' own functions: both pairings, and every frequency scaling."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.deepseek_v2.modeling_deepseek_v2 import apply_rotary_emb
from transformers.models.deepseek_v3.modeling_deepseek_v3 import apply_rotary_pos_emb_interleave
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from ktcore.ops.rope import RopeScaling, RopeSpec, inverse_frequencies, rope, yarn_mscale

THETA = 10000.0
POSITIONS = torch.tensor([0, 1, 2, 63, 64, 1000, 4095])


def _angles(dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    freq, _ = inverse_frequencies(RopeSpec(dim, THETA, "half"))
    angle = torch.cat((POSITIONS[:, None] * freq, POSITIONS[:, None] * freq), -1)
    return angle.cos()[None], angle.sin()[None]


@pytest.mark.parametrize(("dim", "heads"), [(64, 9), (128, 1), (8, 3)])
def test_half_pairing_matches_llama(dim: int, heads: int) -> None:
    q, k = torch.randn(2, len(POSITIONS), heads, dim)
    wanted = apply_rotary_pos_emb(q[None], k[None], *_angles(dim), unsqueeze_dim=2)
    freq, factor = inverse_frequencies(RopeSpec(dim, THETA, "half"))
    for x, expected in zip((q, k), wanted, strict=True):
        torch.testing.assert_close(rope(x, POSITIONS, freq, factor, "half"), expected[0], atol=1e-5, rtol=0)


@pytest.mark.parametrize(("dim", "heads"), [(64, 16), (8, 1)])
def test_interleaved_pairing_matches_deepseek_v2(dim: int, heads: int) -> None:
    q, k = torch.randn(2, len(POSITIONS), heads, dim)
    freq, factor = inverse_frequencies(RopeSpec(dim, THETA, "interleaved"))
    angle = POSITIONS[:, None] * freq
    wanted = apply_rotary_emb(
        q[None].transpose(1, 2), k[None].transpose(1, 2), torch.polar(torch.ones_like(angle), angle)[None]
    )
    for x, expected in zip((q, k), wanted, strict=True):
        ours = rope(x, POSITIONS, freq, factor, "interleaved")
        torch.testing.assert_close(ours, expected[0].transpose(0, 1), atol=1e-5, rtol=0)


def test_interleaved_pairing_gives_deepseek_v3_scores() -> None:
    q, k = torch.randn(2, len(POSITIONS), 4, 16)
    freq, factor = inverse_frequencies(RopeSpec(16, THETA, "interleaved"))
    theirs_q, theirs_k = apply_rotary_pos_emb_interleave(q[None], k[None], *_angles(16), unsqueeze_dim=2)
    ours_q, ours_k = (rope(x, POSITIONS, freq, factor, "interleaved") for x in (q, k))
    # V3 writes all evens, then all odds: the order differs, the scores must not
    theirs = torch.einsum("qhd,khd->hqk", theirs_q[0], theirs_k[0])
    torch.testing.assert_close(torch.einsum("qhd,khd->hqk", ours_q, ours_k), theirs, atol=1e-4, rtol=0)


def test_only_the_first_dim_values_rotate() -> None:
    x = torch.randn(len(POSITIONS), 2, 32)
    freq, factor = inverse_frequencies(RopeSpec(8, THETA, "half"))
    out = rope(x, POSITIONS, freq, factor, "half")
    assert torch.equal(out[..., 8:], x[..., 8:])
    torch.testing.assert_close(out[..., :8], rope(x[..., :8], POSITIONS, freq, factor, "half"))
    assert not torch.allclose(out[1:, :, :8], x[1:, :, :8])


YARN: dict[str, Any] = {"rope_type": "yarn", "factor": 40.0, "original_max_position_embeddings": 4096}
SCALINGS: dict[str, tuple[dict[str, Any], RopeScaling]] = {
    "linear": ({"rope_type": "linear", "factor": 4.0}, RopeScaling("linear", 4.0)),
    "llama3": (
        {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
        RopeScaling("llama3", 8.0, 8192, 1.0, 4.0),
    ),
    "yarn of DeepSeek-V3": (
        YARN | {"beta_fast": 32, "beta_slow": 1, "mscale": 1.0, "mscale_all_dim": 1.0},
        RopeScaling("yarn", 40.0, 4096, mscale=1.0, mscale_all_dim=1.0),
    ),
    "yarn with two magnitudes": (
        YARN | {"mscale": 1.0, "mscale_all_dim": 0.707},
        RopeScaling("yarn", 40.0, 4096, mscale=1.0, mscale_all_dim=0.707),
    ),
    "yarn of Kimi-K2": (
        YARN | {"factor": 64.0, "beta_fast": 1.0, "beta_slow": 1.0, "mscale": 1.0, "mscale_all_dim": 1.0},
        RopeScaling("yarn", 64.0, 4096, beta_fast=1.0, mscale=1.0, mscale_all_dim=1.0),
    ),
    "yarn by default": (YARN, RopeScaling("yarn", 40.0, 4096)),
    "yarn with its own factor": (
        YARN | {"attention_factor": 1.25},
        RopeScaling("yarn", 40.0, 4096, attention_factor=1.25),
    ),
    "yarn whose two borders are one": (
        YARN | {"beta_fast": 1.0, "beta_slow": 1.0, "truncate": False},
        RopeScaling("yarn", 40.0, 4096, beta_fast=1.0, truncate=False),
    ),
    "yarn whose two borders are the first pair": (
        YARN | {"original_max_position_embeddings": 6},
        RopeScaling("yarn", 40.0, 6),
    ),
    "yarn whose border is the last pair": (
        YARN | {"original_max_position_embeddings": 10**9, "beta_fast": 1e6},
        RopeScaling("yarn", 40.0, 10**9, beta_fast=1e6),
    ),
    "yarn without truncation": (YARN | {"truncate": False}, RopeScaling("yarn", 40.0, 4096, truncate=False)),
}


@pytest.mark.parametrize("name", SCALINGS)
@pytest.mark.parametrize("theta", [10000.0, 500000.0])
def test_frequency_scalings_match_transformers(name: str, theta: float) -> None:
    parameters, scaling = SCALINGS[name]
    config = LlamaConfig(
        hidden_size=512,
        num_attention_heads=8,
        max_position_embeddings=163840,
        rope_parameters=parameters | {"rope_theta": theta},
    )
    expected, expected_factor = ROPE_INIT_FUNCTIONS[parameters["rope_type"]](config, device=torch.device("cpu"))
    freq, factor = inverse_frequencies(RopeSpec(64, theta, "half", scaling))
    torch.testing.assert_close(freq, expected, rtol=1e-6, atol=0)
    assert factor == pytest.approx(expected_factor)
    plain, _ = inverse_frequencies(RopeSpec(64, theta, "half"))
    assert not torch.allclose(freq, plain, rtol=1e-3)


def test_plain_frequencies_match_transformers() -> None:
    config = LlamaConfig(hidden_size=512, num_attention_heads=8, rope_parameters={"rope_theta": 1e5})
    freq, factor = inverse_frequencies(RopeSpec(64, 1e5, "half"))
    torch.testing.assert_close(freq, LlamaRotaryEmbedding(config).inv_freq, rtol=1e-6, atol=0)
    assert factor == 1.0


def test_divisors_divide_the_plain_frequencies() -> None:
    divisors = torch.linspace(1, 8, 32)
    freq, factor = inverse_frequencies(RopeSpec(64, 1e5, "interleaved", freq_factors=True), divisors)
    torch.testing.assert_close(freq, inverse_frequencies(RopeSpec(64, 1e5, "half"))[0] / divisors)
    assert factor == 1.0


@pytest.mark.parametrize(
    ("key", "factor", "mscale", "scale"),
    # published models: DeepSeek-V2, V3, Kimi-K2 with two stretches, Moonlight without one
    [
        (192, 40.0, 0.707, 0.114721),
        (192, 40.0, 1.0, 0.135234),
        (192, 32.0, 1.0, 0.130861),
        (192, 64.0, 1.0, 0.144680),
        (192, 1.0, 1.0, 0.0721688),
    ],
)
def test_yarn_magnitude_gives_the_published_softmax_scales(
    key: int, factor: float, mscale: float, scale: float
) -> None:
    assert key**-0.5 * yarn_mscale(factor, mscale) ** 2 == pytest.approx(scale, rel=1e-5)
