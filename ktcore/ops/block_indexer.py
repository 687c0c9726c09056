"""Block indexer of sparse grouped-query attention: which blocks of tokens a query attends to, by few small heads."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from ktcore.ops.base import Spec
from ktcore.ops.indexer import NONE
from ktcore.ops.linear import LinearSpec
from ktcore.ops.norm import RMSNormSpec
from ktcore.ops.rope import RopeSpec

Pool = Literal["mean", "max"]


@dataclass(frozen=True)
class BlockIndexCacheSpec(Spec):
    """One layer's index keys in the pages of its KV cache. Position s is in block s // block.

    pool "mean" (Qwen3.8-Flash-Next): a block that is complete has one key, made of the mean of its tokens' raw keys.
        `append(step, raw [T, dim]) -> float32 [T, dim]` stores the raw keys; row t of the result is the mean of its
        block, if the token is the block's last, and anything otherwise. `complete(step, keys [T, dim])` stores the
        keys of the blocks that end with one of the step's tokens, in these tokens' rows; other rows count for nothing.
        `choose(step, q [T, heads, dim]) -> int32 [T, width]`: the tokens of the `top` complete blocks with the highest
            score(t, b) = sum_h relu(q[t, h] . key[b])
        and all behind the last complete block: one choice for all heads of attention.
    pool "max" (MiniMax-M3): each token has a key. `append(step, keys [T, dim])`, and
        `choose(step, q [T, heads, dim]) -> int32 [T, heads, width]`: for each index head, which belongs to one key head
        of attention, the tokens up to its own of the `top` blocks with the highest
            score_h(t, b) = max over the block's tokens s <= t of q[t, h] . key[s]
        among which the query's own block and the `local` - 1 before it are always.
    Positions rise, and -1 follows them. Of equal scores the earlier block is chosen.
    """

    op: ClassVar[str] = "block_index_cache"
    heads: int
    dim: int
    block: int
    top: int
    pool: Pool
    local: int = 0

    @property
    def width(self) -> int:
        """Most tokens of a choice."""
        return self.top * self.block + (self.block - 1 if self.pool == "mean" else 0)

    def bytes_per_token(self, element_bytes: int) -> int:
        """Cache bytes a token takes in this layer: its key, and its share of the block's."""
        shared = -(-self.dim // self.block) if self.pool == "mean" else 0
        return (self.dim + shared) * element_bytes


@dataclass(frozen=True)
class BlockIndexerSpec(Spec):
    """Call: n float32 [T, hidden], step -> what `choose` of its cache gives.

    `n` is what the attention's projections get. With d = head_dim, and per token:
        q = rope(q_norm(q(n))) -> heads x d
        pool "mean": raw = k(n); of a complete block key = rope(k_norm(mean of raw), at the block's first position)
        pool "max":  key = rope(k_norm(k(n)))
    Rotated are the first values of a head.
    """

    op: ClassVar[str] = "block_indexer"
    hidden: int
    heads: int
    head_dim: int
    q: LinearSpec
    k: LinearSpec
    q_norm: RMSNormSpec
    k_norm: RMSNormSpec
    rope: RopeSpec
    cache: BlockIndexCacheSpec


def block_means(keys: torch.Tensor, block: int) -> torch.Tensor:
    """Raw keys [L, d] of a sequence from its beginning -> the means of its complete blocks, [L // block, d]."""
    whole = len(keys) // block
    return keys[: whole * block].float().view(whole, block, keys.shape[1]).mean(1)


def mean_scores(q: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """q [T, heads, d], keys of blocks [B, d] -> float32 [T, B], as `BlockIndexCacheSpec` says of "mean"."""
    return torch.einsum("thd,bd->thb", q.float(), keys.float()).relu().sum(1)


def max_scores(q: torch.Tensor, keys: torch.Tensor, positions: torch.Tensor, block: int) -> torch.Tensor:
    """q [T, heads, d] at positions int64 [T], keys [L, d] -> float32 [T, heads, ceil(L / block)], as it says of "max".

    Blocks that begin behind a query have -inf.
    """
    length = len(keys)
    scores = torch.einsum("thd,ld->thl", q.float(), keys.float())
    later = torch.arange(length, device=q.device) > positions[:, None].to(q.device)
    scores = scores.masked_fill(later[:, None], float("-inf"))
    scores = torch.nn.functional.pad(scores, (0, -length % block), value=float("-inf"))
    return scores.view(*scores.shape[:2], -1, block).amax(-1)


def choose_blocks(
    scores: torch.Tensor, positions: torch.Tensor, length: int, spec: BlockIndexCacheSpec
) -> torch.Tensor:
    """The choice of queries at positions int64 [T] of a sequence of `length` tokens, as the spec's `choose` gives it.

    Args:
        scores: "mean": [T, complete blocks]; "max": [T, heads, blocks].
    """
    positions = positions.to(scores.device)
    mean = spec.pool == "mean"
    scores = scores[:, None] if mean else scores
    block = torch.arange(scores.shape[-1], device=scores.device)
    # "mean": blocks that end up to the query; "max": blocks that begin up to it
    reach = ((positions + 1) // spec.block if mean else positions // spec.block + 1)[:, None, None]
    if spec.local:
        scores = scores.masked_fill((block >= reach - spec.local) & (block < reach), float("inf"))
    scores = scores.masked_fill(block >= reach, float("-inf"))
    # stable: of equal scores the earlier block comes first
    order = scores.sort(stable=True, dim=-1, descending=True).indices[..., : spec.top]
    first = order.masked_fill(order >= reach, length) * spec.block
    tokens = (first[..., None] + torch.arange(spec.block, device=first.device)).flatten(-2)
    if mean:
        tail = reach * spec.block + torch.arange(spec.block - 1, device=first.device)
        tokens = torch.cat((tokens, tail), -1)
    tokens = tokens.masked_fill(tokens > positions[:, None, None], length).sort(-1).values
    listed = torch.full((*tokens.shape[:-1], spec.width), NONE, dtype=torch.int32, device=tokens.device)
    listed[..., : tokens.shape[-1]] = tokens.masked_fill(tokens == length, NONE).int()
    return listed[:, 0] if mean else listed
