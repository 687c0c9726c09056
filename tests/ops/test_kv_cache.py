"""Attention over cached tokens against torch's scaled_dot_product_attention."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from ktcore.ops.kv_cache import KVCacheSpec, attend


@pytest.mark.parametrize(("heads", "kv_heads"), [(8, 8), (9, 3), (4, 1)])
@pytest.mark.parametrize(("queries", "keys"), [(17, 17), (1, 40), (5, 23), (1, 1)])
@pytest.mark.parametrize(("key_dim", "value_dim"), [(64, 64), (24, 40)])
@pytest.mark.parametrize("window", [0, 7, 1])
def test_attend_matches_torch(
    heads: int, kv_heads: int, queries: int, keys: int, key_dim: int, value_dim: int, window: int
) -> None:
    q = torch.randn(queries, heads, key_dim)
    k, v = torch.randn(keys, kv_heads, key_dim), torch.randn(keys, kv_heads, value_dim)
    row = torch.arange(keys - queries, keys)[:, None]
    column = torch.arange(keys)[None]
    seen = (column <= row) & (column > row - window if window else True)
    expected = scaled_dot_product_attention(
        *(t.double().transpose(0, 1) for t in (q, k, v)), attn_mask=seen, scale=0.2, enable_gqa=True
    ).transpose(0, 1)
    torch.testing.assert_close(attend(q, k, v, 0.2, window).double(), expected, atol=1e-5, rtol=1e-5)


def test_bytes_a_token_takes() -> None:
    assert KVCacheSpec("gqa", 32, 4, 128, 128).bytes_per_token(2) == 4 * 256 * 2
    assert KVCacheSpec("mla", 128, 1, 576, 512).bytes_per_token(2) == 576 * 2


def test_attend_computes_where_its_inputs_are() -> None:
    """Torch's device without storage refuses to compute with tensors of another one, as every accelerator does."""
    q, k = torch.ones(2, 4, 8, device="meta"), torch.ones(5, 2, 8, device="meta")
    found = attend(q, k, k, 0.5, window=3, chunk=4, sinks=torch.ones(4, device="meta"))
    assert (found.device.type, found.shape, found.dtype) == ("meta", (2, 4, 8), torch.float32)
