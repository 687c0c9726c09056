"""Grouped-query attention nodes, as LLaMA, Mistral and Qwen have them."""

from __future__ import annotations

from ktcore.graph.decoder import rms_eps
from ktcore.graph.maker import NodeMaker
from ktcore.graph.node import Node
from ktcore.graph.rotary import rope_node
from ktcore.ops.attention import AttentionSpec, Temperature
from ktcore.ops.kv_cache import KVCacheSpec
from ktcore.ops.norm import RMSNormSpec
from ktcore.ops.rope import Pairing

HEADS = ("num_attention_heads", "attention.head_count")
KV_HEADS = ("num_key_value_heads", "attention.head_count_kv")
MOST_HEADS = 1 << 16  # rows of gated queries are picked head by head


def gqa_node(
    make: NodeMaker,
    name: str,
    layer: int,
    pairing: Pairing | None,
    *,
    qk_norm: bool = False,
    post_norm: bool = False,
    partial: bool = False,
    window: int = 0,
    chunk: int = 0,
    gate: bool = False,
    unit_norm: bool = False,
    whole_norm: bool = False,
    temperature: Temperature | None = None,
    truncate_yarn: bool = True,
) -> Node:
    """One layer's attention branch.

    Args:
        pairing: of the stored q and k rows; None for layers without position embedding.
        qk_norm: RMSNorm over each head of q and k.
        post_norm: RMSNorm over the branch's result.
        partial: checkpoints of the family may rotate a head's beginning only.
        window: tokens a query sees, 0 for all; `ktcore.graph.windows` reads it.
        chunk: a query sees keys of its own chunk of so many positions; 0 for all.
        gate: the query projection holds, head by head, rows of q and then rows of an output gate.
        unit_norm: RMSNorm without weights over each head of q and k, after the position embedding.
        whole_norm: RMSNorm over all heads of q together, and over all of k.
        temperature: of the queries.
        truncate_yarn: YaRN's ramp of GGUF files, which do not say, begins and ends at whole pairs.

    A tensor of sinks, where the family's table names one, makes the heads have them.
    """
    s = make.settings
    hidden = s.integer("hidden_size", "embedding_length")
    heads = s.integer(*HEADS, layer=layer)
    kv_heads = s.integer(*KV_HEADS, derived=heads, layer=layer)
    if not 0 < kv_heads <= heads or heads % kv_heads:
        raise s.error(f"{heads} attention heads cannot share {kv_heads} key heads", s.about(KV_HEADS))
    if heads > MOST_HEADS:
        raise s.error(f"{heads} attention heads are more than any model has", s.about(HEADS))
    even = hidden // heads
    dim = s.integer("head_dim", "attention.key_length", derived=even)
    rotary = s.integer("", "rope.dimension_count", without=dim, derived=dim)
    value = s.integer("", "attention.value_length", without=dim, derived=even)
    if value != dim or (rotary != dim and not partial) or rotary > dim:
        raise s.error("key, value and rotary widths differ, which this architecture is not known to do")
    eps = rms_eps(make)
    sinks = make.names.knows(f"{name}.sinks")
    if gate:
        q, gate_node = _gated_query(make, name, hidden, heads, dim)
        k, v = (make.linear(f"{name}.{role}", hidden, kv_heads * dim) for role in ("k", "v"))
    else:
        (q, k, v), gate_node = _projections(make, name, hidden, heads * dim, kv_heads * dim), None
    weightless = RMSNormSpec(dim, eps, "")
    rope = None
    if pairing is not None:
        rope = rope_node(make, f"{name}.rope", dim, pairing, partial=partial, truncate=truncate_yarn)
    return make.composite(
        name,
        AttentionSpec,
        {
            "q": q,
            "k": k,
            "v": v,
            "o": make.linear(f"{name}.o", heads * dim, hidden),
            "cache": make.node(f"{name}.cache", KVCacheSpec("gqa", heads, kv_heads, dim, dim, window, chunk, sinks)),
            "norm": make.norm(f"{name}.norm", hidden, eps),
            **{
                role: make.node(f"{name}.{role}", weightless)
                if unit_norm
                else make.norm(f"{name}.{role}", dim * (count if whole_norm else 1), eps)
                for role, count in (("q_norm", heads), ("k_norm", kv_heads))
                if qk_norm or unit_norm or whole_norm
            },
            "rope": rope,
            "post_norm": make.norm(f"{name}.post_norm", hidden, eps) if post_norm else None,
            "gate": gate_node,
        },
        {"sinks": make.ref(f"{name}.sinks", (heads,), ".weight" if s.gguf else "")} if sinks else None,
        hidden=hidden,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=dim,
        scale=dim**-0.5,
        norm_after_rope=unit_norm,
        norm_whole=whole_norm,
        sinks=sinks,
        temperature=temperature,
    )


def _gated_query(make: NodeMaker, name: str, hidden: int, heads: int, dim: int) -> tuple[Node, Node]:
    """Queries and output gate, whose rows take turns head by head."""
    whole, rows = f"{name}.q", 2 * heads * dim
    starts = range(0, rows, 2 * dim)
    q = make.picked(whole, whole, hidden, [(at, at + dim, 1) for at in starts], rows)
    return q, make.picked(f"{name}.gate", whole, hidden, [(at + dim, at + 2 * dim, 1) for at in starts], rows)


def _projections(make: NodeMaker, name: str, hidden: int, q_rows: int, kv_rows: int) -> tuple[Node, Node, Node]:
    """q, k and v, stored one by one or as rows of one tensor."""
    whole = f"{name}.qkv"
    rows = {"q": q_rows, "k": kv_rows, "v": kv_rows}
    if make.has(f"{name}.q") or not make.has(whole):
        q, k, v = (make.linear(f"{name}.{role}", hidden, n) for role, n in rows.items())
        return q, k, v
    total = q_rows + 2 * kv_rows
    ends = {"q": q_rows, "k": q_rows + kv_rows, "v": total}
    q, k, v = (
        make.row_span(f"{name}.{role}", whole, hidden, (ends[role] - n, ends[role]), total) for role, n in rows.items()
    )
    return q, k, v
