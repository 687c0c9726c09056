"""Tiny graphs of each family, made by hand so that rule tests need no checkpoint."""

from __future__ import annotations

from dataclasses import replace

from ktcore.graph.node import Graph, Layer, Node
from ktcore.ops import (
    AttentionSpec,
    EmbeddingSpec,
    ExpertsSpec,
    IndexCacheSpec,
    KVCacheSpec,
    LinearSpec,
    MLASpec,
    MLPSpec,
    MoESpec,
    RMSNormSpec,
    RopeSpec,
    RouterSpec,
    SamplingSpec,
    Spec,
    TokenIndexerSpec,
)
from ktcore.weights.ref import WeightRef

HIDDEN, INNER, VOCAB, EXPERTS = 64, 96, 128, 8


def linear(name: str, rows: int, cols: int, fmt: str, layer: int | None = None) -> Node:
    return leaf(name, LinearSpec(cols, rows, fmt), (rows, cols), fmt, layer)


def norm(name: str, dim: int, layer: int | None = None) -> Node:
    return leaf(name, RMSNormSpec(dim, 1e-5), (1, dim), "F32", layer)


def leaf(name: str, spec: Spec, shape: tuple[int, ...], fmt: str, layer: int | None = None) -> Node:
    return Node(name, spec, {"weight": WeightRef((name,), shape, fmt)}, {}, layer)


def whole(
    name: str, kind: type[Spec], parts: dict[str, Node], layer: int, weights: object = None, **values: object
) -> Node:
    spec = kind(**{role: part.spec for role, part in parts.items()}, **values)  # type: ignore[arg-type]
    return Node(name, spec, weights or {}, parts, layer)  # type: ignore[arg-type]


def attention(layer: int, fmt: str) -> Node:
    at = f"layers.{layer}.attn"
    parts = {
        "q": linear(f"{at}.q", HIDDEN, HIDDEN, fmt, layer),
        "k": linear(f"{at}.k", HIDDEN // 2, HIDDEN, fmt, layer),
        "v": linear(f"{at}.v", HIDDEN // 2, HIDDEN, fmt, layer),
        "o": linear(f"{at}.o", HIDDEN, HIDDEN, fmt, layer),
        "cache": Node(f"{at}.cache", KVCacheSpec("gqa", 4, 2, 16, 16), layer=layer),
        "norm": norm(f"{at}.norm", HIDDEN, layer),
        "rope": Node(f"{at}.rope", RopeSpec(16, 1e4, "half"), layer=layer),
    }
    return whole(at, AttentionSpec, parts, layer, hidden=HIDDEN, heads=4, kv_heads=2, head_dim=16, scale=0.25)


def mla(layer: int, fmt: str) -> Node:
    at = f"layers.{layer}.attn"
    parts = {
        "kv_a": linear(f"{at}.kv_a", 32 + 8, HIDDEN, fmt, layer),
        "kv_a_norm": norm(f"{at}.kv_a_norm", 32, layer),
        "o": linear(f"{at}.o", HIDDEN, 64, fmt, layer),
        "rope": Node(f"{at}.rope", RopeSpec(8, 1e4, "interleaved"), layer=layer),
        "cache": Node(f"{at}.cache", KVCacheSpec("mla", 4, 1, 40, 32), layer=layer),
        "q": linear(f"{at}.q", 4 * 24, HIDDEN, fmt, layer),
        "norm": norm(f"{at}.norm", HIDDEN, layer),
    }
    weights = {"kv_b": WeightRef((f"{at}.kv_b",), (4 * 32, 32), fmt)}
    values = {"hidden": HIDDEN, "heads": 4, "nope_dim": 16, "rope_dim": 8, "value_dim": 16, "latent": 32}
    return whole(at, MLASpec, parts, layer, weights, scale=24**-0.5, kv_b_format=fmt, **values)


def mlp(at: str, layer: int, fmt: str, *, branch: bool = True) -> Node:
    parts = {
        "gate": linear(f"{at}.gate", INNER, HIDDEN, fmt, layer),
        "up": linear(f"{at}.up", INNER, HIDDEN, fmt, layer),
        "down": linear(f"{at}.down", HIDDEN, INNER, fmt, layer),
    }
    if branch:
        parts["norm"] = norm(f"{at}.norm", HIDDEN, layer)
    values = {"hidden": HIDDEN, "intermediate": INNER, "activation": "silu", "residual": branch}
    return whole(at, MLPSpec, parts, layer, **values)


def moe(layer: int, fmt: str, *, shared: bool) -> Node:
    at = f"layers.{layer}.ffn"
    spec = ExpertsSpec(HIDDEN, INNER, EXPERTS, 2, "silu", fmt, fmt, fmt)
    stacks = {
        role: WeightRef((f"{at}.{role}",), (EXPERTS, *shape), fmt)
        for role, shape in {"gate": (INNER, HIDDEN), "up": (INNER, HIDDEN), "down": (HIDDEN, INNER)}.items()
    }
    router = RouterSpec(HIDDEN, EXPERTS, 2, "F32")
    parts = {
        "router": leaf(f"{at}.router", router, (EXPERTS, HIDDEN), "F32", layer),
        "experts": Node(f"{at}.experts", spec, stacks, layer=layer),
        "norm": norm(f"{at}.norm", HIDDEN, layer),
    }
    if shared:
        parts["shared"] = mlp(f"{at}.shared", layer, fmt, branch=False)
    return whole(at, MoESpec, parts, layer, hidden=HIDDEN)


def graph(family: str, layers: list[Layer], head_format: str = "Q8_0") -> Graph:
    return Graph(
        architecture=family,
        family=family,
        hidden=HIDDEN,
        vocab=VOCAB,
        context_length=4096,
        embed=leaf("embed", EmbeddingSpec(VOCAB, HIDDEN, "Q8_0"), (VOCAB, HIDDEN), "Q8_0"),
        layers=tuple(layers),
        norm=norm("norm", HIDDEN),
        head=linear("head", VOCAB, HIDDEN, head_format),
        sampler=Node("sampler", SamplingSpec(VOCAB)),
    )


def llama(layers: int = 3, fmt: str = "Q8_0") -> Graph:
    return graph("llama", [Layer(attention(i, fmt), mlp(f"layers.{i}.ffn", i, fmt)) for i in range(layers)])


def qwen3_moe(layers: int = 2, fmt: str = "Q8_0") -> Graph:
    return graph("qwen3_moe", [Layer(attention(i, fmt), moe(i, fmt, shared=False)) for i in range(layers)])


def deepseek_v3(layers: int = 3, fmt: str = "Q8_0") -> Graph:
    """One leading dense layer, then MoE with shared experts."""
    dense = [Layer(mla(0, fmt), mlp("layers.0.ffn", 0, fmt))]
    return graph("deepseek_v3", dense + [Layer(mla(i, fmt), moe(i, fmt, shared=True)) for i in range(1, layers)])


def indexer(at: str, layer: int, fmt: str) -> Node:
    parts = {
        "q": linear(f"{at}.q", 4 * 16, HIDDEN, fmt, layer),
        "k": linear(f"{at}.k", 16, HIDDEN, fmt, layer),
        "weights": linear(f"{at}.weights", 4, HIDDEN, "F32", layer),
        "rope": Node(f"{at}.rope", RopeSpec(8, 1e4, "half"), layer=layer),
        "cache": Node(f"{at}.cache", IndexCacheSpec(4, 16, 12), layer=layer),
    }
    weights = {role: WeightRef((f"{at}.{role}",), (16,), "F32") for role in ("k_norm", "k_norm_bias")}
    values = {"hidden": HIDDEN, "rank": HIDDEN, "heads": 4, "head_dim": 16, "top_k": 12, "eps": 1e-6}
    return whole(at, TokenIndexerSpec, parts, layer, weights, **values)


def deepseek_sparse(layers: int = 2, fmt: str = "Q8_0") -> Graph:
    """The first layer has an indexer, the others share its choice."""
    made = []
    for i in range(layers):
        plain = mla(i, fmt)
        assert isinstance(plain.spec, MLASpec)
        at = plain.name
        own = i == 0
        cache = replace(plain.spec.cache, chosen=True)
        low = {
            "q_a": linear(f"{at}.q_a", HIDDEN, HIDDEN, fmt, i),
            "q_a_norm": norm(f"{at}.q_a_norm", HIDDEN, i),
            "q_b": linear(f"{at}.q_b", 4 * 24, HIDDEN, fmt, i),
        }
        parts = {role: part for role, part in plain.parts.items() if role != "q"} | low
        parts["cache"] = replace(plain.parts["cache"], spec=cache)
        if own:
            parts["indexer"] = indexer(f"{at}.indexer", i, fmt)
        specs = {role: part.spec for role, part in parts.items()}
        spec = replace(plain.spec, q=None, shared_index=not own, **specs)  # type: ignore[arg-type]
        ffn = mlp(f"layers.{i}.ffn", i, fmt) if own else moe(i, fmt, shared=True)
        made.append(Layer(replace(plain, spec=spec, parts=parts), ffn))
    return graph("deepseek_sparse", made)


FAMILIES = {
    "llama": llama,
    "qwen3_moe": qwen3_moe,
    "deepseek_v3": deepseek_v3,
    "deepseek_sparse": deepseek_sparse,
}
