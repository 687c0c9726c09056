"""Absorbing the latent's up-projection changes nothing: both forms against plain attention over expanded keys."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from ktcore.ops.kv_cache import attend
from ktcore.ops.mla import absorb_query, expand_output, split_up_projection


@pytest.mark.parametrize(("heads", "nope", "rope", "value", "latent"), [(4, 16, 8, 24, 32), (2, 128, 64, 128, 512)])
@pytest.mark.parametrize(("queries", "keys"), [(9, 9), (1, 20)])
def test_absorbed_attention_equals_attention_over_expanded_keys(
    heads: int, nope: int, rope: int, value: int, latent: int, queries: int, keys: int
) -> None:
    kv_b = torch.randn(heads * (nope + value), latent, dtype=torch.float64) / latent**0.5
    c, k_rope = torch.randn(keys, latent, dtype=torch.float64), torch.randn(keys, rope, dtype=torch.float64)
    q = torch.randn(queries, heads, nope + rope, dtype=torch.float64)
    scale = (nope + rope) ** -0.5
    # as model code does it: expand, then plain attention
    expanded = (c @ kv_b.T).view(keys, heads, nope + value)
    k = torch.cat((expanded[..., :nope], k_rope[:, None].expand(-1, heads, -1)), -1)
    seen = torch.arange(keys)[None] <= torch.arange(keys - queries, keys)[:, None]
    expected = scaled_dot_product_attention(
        *(t.transpose(0, 1) for t in (q, k, expanded[..., nope:])), attn_mask=seen, scale=scale
    ).transpose(0, 1)

    k_up, v_up = (t.float() for t in split_up_projection(kv_b, heads, nope, value))
    latent_q = torch.cat((absorb_query(q[..., :nope].float(), k_up), q[..., nope:].float()), -1)
    rows = torch.cat((c, k_rope), -1).float()[:, None]
    ours = expand_output(attend(latent_q, rows, rows[..., :latent], scale), v_up)
    torch.testing.assert_close(ours.double(), expected, atol=1e-4, rtol=1e-4)
