"""Grouped-query attention nodes, as LLaMA, Mistral and Qwen have them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

from ktcore.graph.decoder import rms_eps
from ktcore.graph.maker import NodeMaker
from ktcore.graph.node import Node
from ktcore.graph.rotary import rope_node
from ktcore.graph.settings import Settings
from ktcore.ops.attention import AttentionSpec, Temperature
from ktcore.ops.kv_cache import KVCacheSpec
from ktcore.ops.norm import RMSNormSpec
from ktcore.ops.rope import Pairing

HEADS = ("num_attention_heads", "attention.head_count")
KV_HEADS = ("num_key_value_heads", "attention.head_count_kv")
Norms = Literal["", "head", "unit", "whole"]
Gate = Literal["", "rows", "tensor", "head"]
MOST_HEADS = 1 << 16  # rows of gated queries are picked head by head


@dataclass(frozen=True)
class Heads:
    """How many query and key heads a layer has, and how wide they are; `value`: of a value head, 0 for `dim`."""

    query: int
    key: int
    dim: int
    value: int = 0


def check_heads(s: Settings, heads: int, kv_heads: int) -> None:
    """Raises ArchitectureError where heads cannot share key heads, or are more than any model has."""
    if not 0 < kv_heads <= heads or heads % kv_heads:
        raise s.error(f"{heads} attention heads cannot share {kv_heads} key heads", s.about(KV_HEADS))
    if heads > MOST_HEADS:
        raise s.error(f"{heads} attention heads are more than any model has", s.about(HEADS))


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
    norm_after_rope: bool = False,
    bare: bool = False,
    indexer: Callable[[Node], Node] | None = None,
    alpha: bool = False,
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
        norm_after_rope: norms of q and k come after the position embedding.
        bare, indexer: as in `attention_node`.
        alpha: the rotary base may be stretched by `alpha`.

    A tensor of sinks, where the family's table names one, makes the heads have them.
    """
    s = make.settings
    hidden = s.integer("hidden_size", "embedding_length")
    heads = s.integer(*HEADS, layer=layer)
    kv_heads = s.integer(*KV_HEADS, derived=heads, layer=layer)
    check_heads(s, heads, kv_heads)
    even = hidden // heads
    dim = s.integer("head_dim", "attention.key_length", derived=even)
    rotary = s.integer("", "rope.dimension_count", without=dim, derived=dim)
    value = s.integer("", "attention.value_length", without=dim, derived=even)
    if value != dim or (rotary != dim and not partial) or rotary > dim:
        raise s.error("key, value and rotary widths differ, which this architecture is not known to do")
    rope = None
    if pairing is not None:
        rope = rope_node(make, f"{name}.rope", dim, pairing, partial=partial, truncate=truncate_yarn, alpha=alpha)
    return attention_node(
        make,
        name,
        Heads(heads, kv_heads, dim),
        rope,
        norms="unit" if unit_norm else "whole" if whole_norm else "head" if qk_norm else "",
        post_norm=post_norm,
        window=window,
        chunk=chunk,
        gate="rows" if gate else "",
        norm_after_rope=norm_after_rope or unit_norm,
        temperature=temperature,
        sinks=make.names.knows(f"{name}.sinks"),
        bare=bare,
        indexer=indexer,
    )


def attention_node(
    make: NodeMaker,
    name: str,
    heads: Heads,
    rope: Node | None,
    *,
    norms: Norms = "",
    post_norm: bool = False,
    window: int = 0,
    chunk: int = 0,
    gate: Gate = "",
    norm_after_rope: bool = False,
    temperature: Temperature | None = None,
    sinks: bool = False,
    scale: float | None = None,
    value_norm: bool = False,
    values_are_keys: bool = False,
    value_scale: float = 1.0,
    bare: bool = False,
    indexer: Callable[[Node], Node] | None = None,
) -> Node:
    """An attention branch of given sizes, whatever the configuration calls them.

    Args:
        rope: its rotary part; None for layers without position embedding.
        norms: RMSNorm of q and k: "head" over each head, "unit" likewise without weights, "whole" over all heads.
        gate: of the output. "rows": in the query projection, head by head behind q's; "tensor": a projection of its
            own; "head": one that has one value a head.
        scale: of the softmax; None for 1/sqrt(width).
        value_norm: RMSNorm without weights over each value head.
        values_are_keys: values are what the key projection gives, before its norm and rotation.
        value_scale: multiplies the values.
        bare: what stands around the branch norms its input and adds its result.
        indexer: makes the part that chooses the tokens which a query sees, of the rotary part.
    """
    s = make.settings
    hidden, eps = s.integer("hidden_size", "embedding_length"), rms_eps(make)
    count, keys, dim, value = heads.query, heads.key, heads.dim, heads.value or heads.dim
    gate_node = None
    if gate == "rows":
        q, gate_node = _gated_query(make, name, hidden, count, dim)
        k, v = make.linear(f"{name}.k", hidden, keys * dim), make.linear(f"{name}.v", hidden, keys * value)
    else:
        q, k, v = _projections(make, name, hidden, (count * dim, keys * dim, keys * value), values_are_keys)
        if gate:
            gate_node = make.linear(f"{name}.gate", hidden, count * (1 if gate == "head" else value), plain=True)
    weightless = RMSNormSpec(dim, eps, "")
    narrow = 0 if value == dim else value
    cache = KVCacheSpec("gqa", count, keys, dim, value, window, chunk, sinks, chosen=indexer is not None)
    if indexer is not None and rope is None:
        raise s.error("index heads rotate as those of attention do, and these do not")
    return make.composite(
        name,
        AttentionSpec,
        {
            "q": q,
            "k": k,
            "v": v,
            "o": make.linear(f"{name}.o", count * value, hidden),
            "cache": make.node(f"{name}.cache", cache),
            "norm": None if bare else make.norm(f"{name}.norm", hidden, eps),
            **{
                role: make.node(f"{name}.{role}", weightless)
                if norms == "unit"
                else make.norm(f"{name}.{role}", dim * (many if norms == "whole" else 1), eps)
                for role, many in (("q_norm", count), ("k_norm", keys))
                if norms
            },
            "v_norm": make.node(f"{name}.v_norm", RMSNormSpec(value, eps, "")) if value_norm else None,
            "rope": rope,
            "post_norm": make.norm(f"{name}.post_norm", hidden, eps) if post_norm else None,
            "gate": gate_node,
            "indexer": indexer(rope) if indexer is not None and rope is not None else None,
        },
        {"sinks": make.ref(f"{name}.sinks", (count,), ".weight" if s.gguf else "")} if sinks else None,
        hidden=hidden,
        heads=count,
        kv_heads=keys,
        head_dim=dim,
        scale=dim**-0.5 if scale is None else scale,
        norm_after_rope=norm_after_rope,
        norm_whole=norms == "whole",
        sinks=sinks,
        temperature=temperature,
        value_dim=narrow,
        value_scale=value_scale,
        head_gate=gate == "head",
        residual=not bare,
    )


def _gated_query(make: NodeMaker, name: str, hidden: int, heads: int, dim: int) -> tuple[Node, Node]:
    """Queries and output gate, whose rows take turns head by head."""
    whole, rows = f"{name}.q", 2 * heads * dim
    starts = range(0, rows, 2 * dim)
    q = make.picked(whole, whole, hidden, [(at, at + dim, 1) for at in starts], rows)
    return q, make.picked(f"{name}.gate", whole, hidden, [(at + dim, at + 2 * dim, 1) for at in starts], rows)


def _projections(
    make: NodeMaker, name: str, hidden: int, sizes: tuple[int, int, int], values_are_keys: bool
) -> tuple[Node, Node, Node]:
    """q, k and v, stored one by one or as rows of one tensor; v may be k's tensor once more."""
    whole, roles = f"{name}.qkv", ("q", "k", "v")
    if make.has(f"{name}.q") or not make.has(whole):
        q, k = (make.linear(f"{name}.{role}", hidden, n) for role, n in zip("qk", sizes, strict=False))
        v = replace(k, name=f"{name}.v") if values_are_keys else make.linear(f"{name}.v", hidden, sizes[2])
        return q, k, v
    total, end, parts = sum(sizes), 0, []
    for role, n in zip(roles, sizes, strict=True):
        end += n
        parts.append(make.row_span(f"{name}.{role}", whole, hidden, (end - n, end), total))
    return parts[0], parts[1], parts[2]
