"""Masks, sinks and temperature of attention against transformers' own functions."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from transformers import Llama4TextConfig
from transformers.models.gpt_oss.modeling_gpt_oss import eager_attention_forward
from transformers.models.llama4.modeling_llama4 import Llama4TextAttention

from ktcore.ops.attention import Temperature, tempered
from ktcore.ops.kv_cache import attend

HEADS, KV, DIM, LENGTH = 4, 2, 8, 40


def _qkv() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(5)
    q = torch.randn(LENGTH, HEADS, DIM, generator=g)
    return q, torch.randn(LENGTH, KV, DIM, generator=g), torch.randn(LENGTH, KV, DIM, generator=g)


@pytest.mark.parametrize("window", [0, 7])
def test_sinks_match_gpt_oss(window: int) -> None:
    q, k, v = _qkv()
    sinks = torch.tensor([-2.0, 0.0, 1.0, 4.0])
    i, j = torch.arange(LENGTH)[:, None], torch.arange(LENGTH)[None]
    hidden = (j > i) | ((j <= i - window) if window else torch.tensor(False))
    mask = torch.zeros(LENGTH, LENGTH).masked_fill(hidden, float("-inf"))
    module = SimpleNamespace(sinks=sinks, num_key_value_groups=HEADS // KV, training=False)
    parts = (t.transpose(0, 1)[None] for t in (q, k, v))
    expected, _ = eager_attention_forward(module, *parts, mask, 0.3)  # type: ignore[arg-type]
    torch.testing.assert_close(attend(q, k, v, 0.3, window, sinks=sinks), expected[0])
    # the last tokens alone, as in decoding
    torch.testing.assert_close(attend(q[-3:], k, v, 0.3, window, sinks=sinks), expected[0][-3:])


@pytest.mark.parametrize("tokens", [LENGTH, 5, 1])
def test_a_chunk_is_attention_over_its_own_tokens(tokens: int) -> None:
    q, k, v = _qkv()
    chunk = 16
    whole = [attend(q[a : a + chunk], k[a : a + chunk], v[a : a + chunk], 0.3) for a in range(0, LENGTH, chunk)]
    torch.testing.assert_close(attend(q[-tokens:], k, v, 0.3, chunk=chunk), torch.cat(whole)[-tokens:])


def test_temperature_matches_llama4() -> None:
    config = Llama4TextConfig(
        hidden_size=32, num_attention_heads=4, num_key_value_heads=4, head_dim=8, num_hidden_layers=4, floor_scale=8
    )
    config._attn_implementation = "eager"
    torch.manual_seed(1)
    module = Llama4TextAttention(config, 3)
    assert not module.use_rope
    x = torch.randn(1, LENGTH, 32)
    seen: list[torch.Tensor] = []
    module.o_proj.register_forward_hook(lambda m, inputs, out: seen.append(inputs[0][0]))
    mask = torch.full((LENGTH, LENGTH), float("-inf")).triu(1)
    with torch.no_grad():
        module(x, torch.empty(0), mask)
        q, k, v = (p(x[0]).view(LENGTH, 4, 8) for p in (module.q_proj, module.k_proj, module.v_proj))
        q = tempered(q, torch.arange(LENGTH), Temperature(config.attn_scale, config.floor_scale))
        torch.testing.assert_close(attend(q, k, v, 8**-0.5).flatten(1), seen[0], atol=1e-6, rtol=1e-5)
