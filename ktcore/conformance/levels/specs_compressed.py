"""A spec of attention over a window and compressed entries, for its cases."""

from __future__ import annotations

from typing import Any

from ktcore.conformance.levels.specs import linear, norm
from ktcore.ops import CompressedAttentionSpec, EntryCacheSpec, EntryIndexerSpec, RopeSpec, WindowCacheSpec


def compressed(
    fmt: str = "F32", ratio: int = 0, top_k: int = 0, *, window: int = 8, q_eps: float = 1e-6, hidden: int = 256
) -> CompressedAttentionSpec:
    """A branch with pre-norm and residual; with `top_k` windows of `ratio` tokens overlap, and an indexer chooses."""
    heads, dim, rank, groups, o_rank, index = 4, 64, 64, 2, 32, 32
    turn = RopeSpec(16, 1e4, "interleaved")

    def pool(width: int, kept: int) -> dict[str, Any]:
        return {
            "pool_values": linear(hidden, width, fmt),
            "pool_gates": linear(hidden, width, fmt),
            "pool_norm": norm(kept),
        }

    entries = EntryCacheSpec(heads, dim, ratio, top_k > 0, chosen=top_k > 0) if ratio else None
    chosen = EntryCacheSpec(16, index, ratio, True, top_k) if top_k else None
    indexer = (
        EntryIndexerSpec(
            hidden=hidden,
            rank=rank,
            heads=16,
            head_dim=index,
            q=linear(rank, 16 * index, fmt),
            weights=linear(hidden, 16, "F32"),
            rope=turn,
            entries=chosen,
            **pool(chosen.width, index),
        )
        if chosen
        else None
    )
    return CompressedAttentionSpec(
        hidden=hidden,
        heads=heads,
        head_dim=dim,
        groups=groups,
        o_rank=o_rank,
        q_eps=q_eps,
        q_a=linear(hidden, rank, fmt),
        q_a_norm=norm(rank),
        q_b=linear(rank, heads * dim, fmt),
        kv=linear(hidden, dim, fmt),
        kv_norm=norm(dim),
        o_b=linear(groups * o_rank, hidden, fmt),
        rope=turn,
        window=WindowCacheSpec(heads, dim, window),
        o_a_format=fmt,
        entries=entries,
        indexer=indexer,
        norm=norm(hidden),
        **(pool(entries.width, dim) if entries else {}),
    )
