"""DeepSeek-V4's attention nodes, and how both kinds of checkpoint say which layers compress what they remember."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from ktcore.graph.decoder import rms_eps
from ktcore.graph.defaults import Defaults
from ktcore.graph.maker import NodeMaker
from ktcore.graph.node import Node
from ktcore.graph.rotary import ABSENT, NULL, TRAINED, gguf_scaling, hub_scaling
from ktcore.graph.settings import Settings
from ktcore.ops.compressed import CompressedAttentionSpec, EntryCacheSpec, EntryIndexerSpec, WindowCacheSpec
from ktcore.ops.rope import RopeScaling, RopeSpec

SLIDING, SPARSE, HEAVY = "sliding_attention", "compressed_sparse_attention", "heavily_compressed_attention"
RATIOS = {0: SLIDING, 4: SPARSE, 128: HEAVY}
SPARSE_RATIO = 4  # of GGUF files: their layers with an indexer
ROTATED = 64 / 512  # of a head, where no key says


def layer_kinds(s: Settings) -> list[tuple[int, bool]]:
    """Each layer's compression ratio, 0 for none, and whether an indexer chooses among its entries.

    Raises:
        ArchitectureError: an unknown word or ratio, or too few of them.
    """
    layers = s.layers() - s.integer("", "nextn_predict_layers", least=0, without=0)
    if s.gguf:
        ratios = s.get("", "attention.compress_ratios")
        good = not isinstance(ratios, (str, int, float)) and len(ratios) >= layers
        if not good or not all(type(r) is int and r >= 0 for r in ratios):
            raise s.error(f"attention.compress_ratios is {ratios!r}, a number is needed for each of {layers} layers")
        return [(ratio, ratio == SPARSE_RATIO) for ratio in ratios[:layers]]
    kinds, rates = _kinds(s, layers), _rates(s)
    return [(0 if kind == SLIDING else rates[kind], kind == SPARSE) for kind in kinds]


def attention_node(make: NodeMaker, name: str, kind: tuple[int, bool]) -> Node:
    """One layer's branch, for between residual streams.

    Args:
        kind: as `layer_kinds` gives it.
    """
    s = make.settings
    ratio, sparse = kind
    hidden = s.integer("hidden_size", "embedding_length")
    heads = s.integer("num_attention_heads", "attention.head_count")
    width = s.integer("head_dim", "attention.key_length", derived=hidden // heads)
    rank = s.integer("q_lora_rank", "attention.q_lora_rank")
    groups = s.integer("o_groups", "attention.output_group_count")
    o_rank = s.integer("o_lora_rank", "attention.output_lora_rank")
    if heads % groups:
        raise s.error(
            f"{groups} groups cannot share {heads} heads",
            s.about(("o_groups", "attention.output_group_count"), ("num_attention_heads", "attention.head_count")),
        )
    eps = rms_eps(make)
    o_a = make.ref(f"{name}.o_a", (groups, o_rank, heads // groups * width), fold=True)
    sinks = make.ref(f"{name}.sinks", (heads,), "")
    window = s.integer("sliding_window", "attention.sliding_window")
    entries = EntryCacheSpec(heads, width, ratio, sparse, chosen=sparse) if ratio else None
    pool, ape = _pool(make, name, hidden, entries) if entries else ({}, {})
    return make.composite(
        name,
        CompressedAttentionSpec,
        {
            "q_a": make.linear(f"{name}.q_a", hidden, rank),
            "q_a_norm": make.norm(f"{name}.q_a_norm", rank, eps),
            "q_b": make.linear(f"{name}.q_b", rank, heads * width),
            "kv": make.linear(f"{name}.kv", hidden, width),
            "kv_norm": make.norm(f"{name}.kv_norm", width, eps),
            "o_b": make.linear(f"{name}.o_b", groups * o_rank, hidden),
            "rope": _rope(make, f"{name}.rope", width, ratio > 0),
            "window": make.node(f"{name}.window", WindowCacheSpec(heads, width, window)),
            **pool,
            "indexer": _indexer(make, f"{name}.indexer", hidden, rank, ratio) if sparse else None,
            "norm": make.norm(f"{name}.norm", hidden, eps),
        },
        {"o_a": o_a, "sinks": sinks, **ape},
        hidden=hidden,
        heads=heads,
        head_dim=width,
        groups=groups,
        o_rank=o_rank,
        q_eps=eps,
        o_a_format=o_a.format,
        sinks_format=sinks.format,
        residual=False,
        ape_format=ape["ape"].format if ape else "F32",
    )


def _indexer(make: NodeMaker, name: str, hidden: int, rank: int, ratio: int) -> Node:
    s = make.settings
    heads = s.integer("index_n_heads", "attention.indexer.head_count")
    width = s.integer("index_head_dim", "attention.indexer.key_length")
    top_k = s.integer("index_topk", "attention.indexer.top_k")
    entries = EntryCacheSpec(heads, width, ratio, True, top_k)
    pool, ape = _pool(make, name, hidden, entries)
    return make.composite(
        name,
        EntryIndexerSpec,
        {
            "q": make.linear(f"{name}.q", rank, heads * width),
            "weights": make.linear(f"{name}.weights", hidden, heads),
            "rope": _rope(make, f"{name}.rope", width, True),
            **pool,
        },
        ape,
        hidden=hidden,
        rank=rank,
        heads=heads,
        head_dim=width,
        ape_format=ape["ape"].format,
    )


def _pool(make: NodeMaker, name: str, hidden: int, entries: EntryCacheSpec) -> tuple[dict[str, Node], dict[str, Any]]:
    """The parts that make entries, and the weight that goes with them."""
    return {
        "pool_values": make.linear(f"{name}.pool_values", hidden, entries.width),
        "pool_gates": make.linear(f"{name}.pool_gates", hidden, entries.width),
        "pool_norm": make.norm(f"{name}.pool_norm", entries.dim, rms_eps(make)),
        "entries": make.node(f"{name}.entries", entries),
    }, {"ape": make.ref(f"{name}.ape", (entries.ratio, entries.width), "")}


def _rope(make: NodeMaker, name: str, width: int, compressed: bool) -> Node:
    """Layers that compress have a base of their own, and YaRN without its factor on cos and sin."""
    s = make.settings
    if s.gguf:
        dim = s.integer("", "rope.dimension_count", derived=width)
        theta = s.number("", "attention.compress_rope_freq_base" if compressed else "rope.freq_base", positive=True)
        scaling = gguf_scaling(s) if compressed else None
    else:
        section = _section(s, compressed)
        dim = _rotated(s, section)
        theta = section.number("rope_theta", "", positive=True)
        scaling = hub_scaling(s, section)
    if dim < 2 or dim % 2 or dim > width or theta == 1.0:
        raise s.error(f"rotary position embedding of width {dim} and base {theta} is not possible")
    return make.node(name, RopeSpec(dim, theta, "interleaved", _plain(scaling)))


def _plain(scaling: RopeScaling | None) -> RopeScaling | None:
    if scaling is None or scaling.kind != "yarn" or scaling.attention_factor is not None:
        return scaling
    return replace(scaling, attention_factor=1.0)


def _section(s: Settings, compressed: bool) -> Settings:
    """Rotary settings of a kind of layer: an object a kind, as transformers saves it, or one for both as on the hub."""
    found = s.given("rope_scaling") or s.given("rope_parameters") or {}
    if not isinstance(found, Mapping):
        raise s.error(f"rope settings are {found!r}, an object is needed")
    main, compress = found.get("main"), found.get("compress")
    if isinstance(main, Mapping) and isinstance(compress, Mapping):
        part = compress if compressed else main
        return s.within({"rope_type": part.get("type", "default"), **part}, Defaults(hub=ABSENT, null=NULL))
    flat = {key: value for key, value in found.items() if key not in ("main", "compress")} if compressed else {}
    flat.setdefault("rope_type", flat.get("type", "default"))
    flat["rope_theta"] = s.number("compress_rope_theta" if compressed else "rope_theta", "", positive=True)
    if s.given(TRAINED) is not None:
        flat[TRAINED] = s.given(TRAINED)
    return s.within(flat, Defaults(hub=ABSENT, null=NULL))


def _rotated(s: Settings, section: Settings) -> int:
    """How many of a head's values rotate."""
    share = s.get("partial_rotary_factor", "")
    width = s.integer("head_dim", "")
    if share is None:
        dim = s.get("qk_rope_head_dim", "")
        share = ROTATED if dim is None else s.integer("qk_rope_head_dim", "") / width
    else:
        share = s.number("partial_rotary_factor", "", positive=True)
    own = section.given("partial_rotary_factor")
    if own not in (None, share):
        raise s.error(f"partial_rotary_factor is {own!r} in the rotary settings, {share!r} outside of them")
    return int(width * share)


def _kinds(s: Settings, layers: int) -> list[str]:
    kinds = s.get("layer_types", "")
    if kinds is None:
        ratios = s.get("compress_ratios", "")
        if ratios is None:  # V4-Pro's: two layers that compress heavily, then both kinds in turn
            return [HEAVY if layer < 2 or layer % 2 == 0 else SPARSE for layer in range(layers)]
        # further ones are of layers that predict further tokens
        if not isinstance(ratios, list) or len(ratios) < layers or any(type(r) is not int for r in ratios):
            raise s.error(f"compress_ratios is {ratios!r}, a number is needed for each of {layers} layers")
        unknown = next((ratio for ratio in ratios[:layers] if ratio not in RATIOS), None)
        if unknown is not None:
            raise s.error(f"compress_ratios holds {unknown}", f"known: {', '.join(map(str, RATIOS))}")
        return [RATIOS[ratio] for ratio in ratios[:layers]]
    if not isinstance(kinds, list) or len(kinds) < layers or not set(kinds[:layers]) <= set(RATIOS.values()):
        raise s.error(
            f"layer_types is {kinds!r}, one of {', '.join(RATIOS.values())} is needed for each of {layers} layers"
        )
    return kinds[:layers]


def _rates(s: Settings) -> dict[str, int]:
    """Tokens an entry, by kind of layer."""
    found = s.get("compress_rates", "")
    rates: dict[str, int] = {}
    for kind, usual, key in ((SPARSE, 4, "compress_rate_csa"), (HEAVY, 128, "compress_rate_hca")):
        said = s.get(key, "")
        if said is None:
            said = found.get(kind) if isinstance(found, Mapping) else usual if found is None else None
        if type(said) is not int or said < 1:
            raise s.error(f"{key}, or compress_rates of {kind}, is {said!r}, a whole number above 0 is needed")
        rates[kind] = said
    return rates
