"""Indexers of blocks of tokens, as Qwen3.8-Flash-Next and MiniMax-M3 have them beside their attention."""

from __future__ import annotations

from ktcore.graph.decoder import rms_eps
from ktcore.graph.maker import NodeMaker
from ktcore.graph.names import NameTable
from ktcore.graph.node import Node
from ktcore.ops.block_indexer import BlockIndexCacheSpec, BlockIndexerSpec

BLOCK_INDEXER: NameTable = {
    # rows of q, then those of k, in hub folders of Qwen3.8-Flash-Next
    "attn.indexer.qk": ("self_attn.indexer.index_qk_proj", ""),
    "attn.indexer.q": ("self_attn.index_q_proj", "indexer.q_proj"),
    "attn.indexer.k": ("self_attn.index_k_proj", "indexer.k_proj"),
    "attn.indexer.q_norm": ("self_attn.index_q_norm", "indexer.q_norm"),
    "attn.indexer.k_norm": ("self_attn.index_k_norm", "indexer.k_norm"),
}
"""MiniMax-M3's, and of both in GGUF."""
MEAN_INDEXER: NameTable = {
    **BLOCK_INDEXER,
    "attn.indexer.q_norm": ("self_attn.indexer.q_layernorm", "indexer.q_norm"),
    "attn.indexer.k_norm": ("self_attn.indexer.k_layernorm", "indexer.k_norm"),
}
"""Qwen3.8-Flash-Next's."""


def block_indexer_node(make: NodeMaker, name: str, cache: BlockIndexCacheSpec, rope: Node) -> Node:
    """The indexer part of an attention branch, `name` ending in "indexer".

    Args:
        rope: of the attention; the indexer turns its own heads likewise.
    """
    s = make.settings
    hidden, eps = s.integer("hidden_size", "embedding_length"), rms_eps(make)
    if getattr(rope.spec, "dim", 0) > cache.dim:
        raise s.error(f"index heads of {cache.dim} values are narrower than the part of a head that rotates")
    rows, whole = cache.heads * cache.dim, f"{name}.qk"
    if not s.gguf and cache.pool == "mean":
        total = rows + cache.dim
        q = make.row_span(f"{name}.q", whole, hidden, (0, rows), total)
        k = make.row_span(f"{name}.k", whole, hidden, (rows, total), total)
    else:
        q, k = make.linear(f"{name}.q", hidden, rows), make.linear(f"{name}.k", hidden, cache.dim)
    return make.composite(
        name,
        BlockIndexerSpec,
        {
            "q": q,
            "k": k,
            "q_norm": make.norm(f"{name}.q_norm", cache.dim, eps),
            "k_norm": make.norm(f"{name}.k_norm", cache.dim, eps),
            "rope": make.node(f"{name}.rope", rope.spec, rope.weights),
            "cache": make.node(f"{name}.cache", cache),
        },
        hidden=hidden,
        heads=cache.heads,
        head_dim=cache.dim,
    )
