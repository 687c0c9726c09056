"""Pooled index keys (GLM-5.3-Flash): the keys of some tokens in a row become one, and whole pools are chosen."""

from __future__ import annotations

import torch

from ktcore.ops.block_indexer import BlockIndexCacheSpec, choose_blocks
from ktcore.ops.indexer import IndexCacheSpec, index_scores


def pooled_keys(keys: torch.Tensor, gates: torch.Tensor, pool: int) -> torch.Tensor:
    """Keys and gates [L, d] of a sequence from its beginning -> keys of its complete pools, float32 [L // pool, d].

    A pool's key is the mean of its tokens' keys, weighted by channel with the softmax of their gates.
    """
    whole = len(keys) // pool
    k, g = (t[: whole * pool].float().view(whole, pool, keys.shape[1]) for t in (keys, gates))
    return (g.softmax(1) * k).sum(1)


def choose_pools(
    q: torch.Tensor, weights: torch.Tensor, keys: torch.Tensor, positions: torch.Tensor, length: int, s: IndexCacheSpec
) -> torch.Tensor:
    """int32 [T, width] as `choose` of `IndexCacheSpec` gives it; keys [L // pool, d] of the complete pools.

    Args:
        positions: int64 [T], of the queries; length: L, of the sequence.
    """
    blocks = BlockIndexCacheSpec(s.heads, s.dim, s.pool, s.top_k // s.pool, "mean")
    return choose_blocks(index_scores(q, weights, keys), positions, length, blocks)
