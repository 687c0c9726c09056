"""Token indexer of sparse attention (DeepSeek-V3.2's report, 2025, section 2.1): which tokens a query attends to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from ktcore.ops.base import Spec
from ktcore.ops.linear import LinearSpec
from ktcore.ops.rope import RopeSpec

NONE = -1
"""Fills the places of a choice that no token has."""


@dataclass(frozen=True)
class IndexCacheSpec(Spec):
    """One layer's index keys, a row a token, in the pages that the layer's KV cache has.

    `append(step, keys float32 [T, dim])` stores those of the step's tokens. `choose(step, q [T, heads, dim], weights
    [T, heads]) -> int32 [T, top_k]` gives the positions in its sequence that each query attends to, rising, then -1:
    of those up to its own the `top_k` with the highest
        score(t, s) = sum_h weights[t, h] * relu(q[t, h] . key[s])
    and all where there are no more; the earlier one where scores are equal.

    With `pool` keys are pooled (GLM-5.3-Flash): `append(step, keys [T, dim], gates [T, dim])`, and tokens
    p * pool .. (p + 1) * pool - 1 of a sequence have one key, sum_j softmax_j(gate_j) * key_j, a softmax a channel.
    `choose` gives int32 [T, width]: the tokens of the top_k / pool complete pools with the highest scores, of those
    that end up to the query, and always those behind the last such pool.

    Attributes:
        top_k: tokens that are chosen by score; a multiple of `pool`.
        pool: tokens of a pool; 0: each token has a key of its own.
    """

    op: ClassVar[str] = "index_cache"
    heads: int
    dim: int
    top_k: int
    pool: int = 0

    @property
    def width(self) -> int:
        """Most tokens of a choice: up to so many of a sequence, all are chosen."""
        return self.top_k + max(self.pool - 1, 0)

    def bytes_per_token(self, element_bytes: int) -> int:
        """Cache bytes a token takes in this layer: its key, and where keys are pooled its gates and share of a key."""
        shared = self.dim + -(-self.dim // self.pool) if self.pool else 0
        return (self.dim + shared) * element_bytes


@dataclass(frozen=True)
class TokenIndexerSpec(Spec):
    """Call: n float32 [T, hidden], low float32 [T, rank], step -> int32 [T, width], as `choose` of its cache gives it.

    `n` is what the attention's projections get, `low` the normed low-rank query. With n = heads, d = head_dim:
        q = rope(q(low)) -> heads x d;  key = rope(layer_norm(k(n))) -> d;  w = weights(n) * n^-1/2 * d^-1/2
        the cache stores the key, then chooses by q and w
    Rotated are the first values of a head. Weights of its own: `k_norm` [d] and `k_norm_bias` [d] of the LayerNorm.
    Where the cache pools, it also stores gates: gate(n) + ape[position mod pool], `ape` [pool, d] a weight, too.

    Attributes:
        eps: of the LayerNorm.
        rope: None where nothing rotates.
        gate: [d, hidden], where the cache pools keys.
    """

    op: ClassVar[str] = "token_indexer"
    hidden: int
    rank: int
    heads: int
    head_dim: int
    top_k: int
    q: LinearSpec
    k: LinearSpec
    weights: LinearSpec
    cache: IndexCacheSpec
    eps: float
    k_norm_format: str = "F32"
    ape_format: str = "F32"
    rope: RopeSpec | None = None
    gate: LinearSpec | None = None

    @property
    def scale(self) -> float:
        """What head weights are multiplied with."""
        return float((self.heads * self.head_dim) ** -0.5)


def layer_norm(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float) -> torch.Tensor:
    """(x - mean) / sqrt(var + eps) * weight + bias over the last axis, in float32."""
    x = x.float()
    x = x - x.mean(-1, keepdim=True)
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * weight + bias


def index_scores(q: torch.Tensor, weights: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """q [T, heads, d], weights [T, heads], keys [L, d] -> float32 [T, L], as `IndexCacheSpec` says."""
    each = torch.einsum("thd,ld->thl", q.float(), keys.float()).relu()
    return torch.einsum("th,thl->tl", weights.float(), each)


def choose_tokens(scores: torch.Tensor, positions: torch.Tensor, top_k: int) -> torch.Tensor:
    """Scores [T, L] of the cached tokens, positions int64 [T] of the queries -> int32 [T, top_k], rising, then -1."""
    length = scores.shape[1]
    later = torch.arange(length, device=scores.device) > positions[:, None].to(scores.device)
    # stable: of equal scores the earlier token comes first
    order = scores.masked_fill(later, float("-inf")).sort(stable=True, dim=-1, descending=True).indices[:, :top_k]
    order = order.masked_fill(order > positions[:, None].to(scores.device), length).sort(-1).values
    chosen = torch.full((scores.shape[0], top_k), NONE, dtype=torch.int32, device=scores.device)
    chosen[:, : order.shape[1]] = order.masked_fill(order == length, NONE).int()
    return chosen
