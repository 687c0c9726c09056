"""Step-3.5 and 3.7-Flash: windows of more heads, gates of one value a head, sigmoid-routed experts within limits."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ktcore.graph.attention import HEADS, KV_HEADS, Heads, attention_node, check_heads
from ktcore.graph.decoder import decoder_graph, rms_eps
from ktcore.graph.defaults import DERIVED, Defaults
from ktcore.graph.experts import Experts, Routing, moe_node
from ktcore.graph.gating import SIGMOID, is_sigmoid
from ktcore.graph.layerwise import FULL, SLIDING, kind_of, own_count, own_settings
from ktcore.graph.maker import NodeMaker
from ktcore.graph.names import ATTENTION, MOE, NameTable
from ktcore.graph.node import Graph, Node
from ktcore.graph.rotary import rope_node, section_of
from ktcore.graph.settings import Settings
from ktcore.ops.mlp import ClampedGLU

NAMES: NameTable = {
    "attn.gate": ("self_attn.g_proj", "attn_gate"),
    "ffn.router": ("moe.gate", "ffn_gate_inp"),
    "ffn.router.bias": ("moe.router_bias", "exp_probs_b.bias"),
    "ffn.experts.gate": ("moe.gate_proj", "ffn_gate_exps"),
    "ffn.experts.up": ("moe.up_proj", "ffn_up_exps"),
    "ffn.experts.down": ("moe.down_proj", "ffn_down_exps"),
    "ffn.shared.gate": ("share_expert.gate_proj", "ffn_gate_shexp"),
    "ffn.shared.up": ("share_expert.up_proj", "ffn_up_shexp"),
    "ffn.shared.down": ("share_expert.down_proj", "ffn_down_shexp"),
}
OTHER = "attention_other_setting"
FIRST_SPARSE = 3

DEFAULTS = Defaults(
    hub={
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
        "rope_theta": 10000.0,
        "partial_rotary_factor": 1.0,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "num_sliding_attention_heads": None,
        "query_pre_attn_scalar": None,
        "attention_bias": False,
        "mlp_bias": False,
        "layer_types": None,
        "mlp_layer_types": None,
        "n_routed_experts": 288,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": 1280,
        "share_expert_dim": 1280,
        "moe_router_scaling_factor": 1.0,
        "swiglu_limits": None,
        "swiglu_limits_shared": None,
    },
    null={
        "layer_types": [],
        "mlp_layer_types": [],
        "num_sliding_attention_heads": 0,
        "query_pre_attn_scalar": DERIVED,
        "swiglu_limits": [],
        "swiglu_limits_shared": [],
    },
    gguf={
        "expert_gating_func": SIGMOID,
        "expert_weights_norm": False,
        "rope.freq_base_swa": 10000.0,
        "rope.dimension_count_swa": DERIVED,
        "swiglu_clamp_exp": 0.0,
        "swiglu_clamp_shexp": 0.0,
    },
    biases={**dict.fromkeys("qkvo", "attention_bias"), **dict.fromkeys(("gate", "up", "down"), "mlp_bias")},
    only={
        "use_head_wise_attn_gate": (True,),
        "use_qk_norm": (True,),
        "use_moe_router_bias": (True,),
        "moe_router_activation": ("sigmoid",),
        "norm_expert_weight": (True,),
        "zero_centered": (True,),
        "yarn_only_types": ([FULL],),
    },
)
"""Of `Step3p7TextConfig` in transformers, which does not read the keys of `only`, and of `step35` in llama.cpp."""


def build_step3p5(settings: Settings) -> Graph:
    """`step3p5` of hub folders, alone or as a part, `step35` of GGUF files."""
    settings = settings.under(DEFAULTS)
    # converters add 1 to the norms
    make = NodeMaker(settings, {**ATTENTION, **MOE, **NAMES}, norm_offset=0.0 if settings.gguf else 1.0)
    hidden, eps = settings.integer("hidden_size", "embedding_length"), rms_eps(make)
    sigmoid = not settings.gguf or is_sigmoid(settings)
    routing = Routing(
        experts=settings.integer("n_routed_experts|moe_num_experts|num_local_experts", "expert_count"),
        top_k=settings.integer("num_experts_per_tok|moe_top_k", "expert_used_count"),
        score="sigmoid" if sigmoid else "softmax",
        choice_bias=True,
        renormalise=settings.flag("", "expert_weights_norm", without=True),
        scale=settings.number("moe_router_scaling_factor", "expert_weights_scale") or 1.0,
    )

    def attention(name: str, layer: int) -> Node:
        slides = _slides(settings, layer)
        heads = _heads(settings, layer, slides)
        return attention_node(
            make,
            name,
            heads,
            _rope(make, f"{name}.rope", layer, slides, heads.dim),
            norms="head",
            gate="head",
            window=settings.integer("sliding_window", "attention.sliding_window") if slides else 0,
            scale=_spread(settings, heads.dim) ** -0.5,
        )

    def ffn(name: str, layer: int) -> Node:
        own, shared_own = (_limit(settings, layer, *keys) for keys in LIMITS)
        if _is_dense(make, name, layer):
            width = settings.integer("intermediate_size", "feed_forward_length", layer=layer)
            return make.mlp(name, hidden, width, eps=eps, clamped=shared_own, activation="silu")
        width = settings.integer("moe_intermediate_size", "expert_feed_forward_length", layer=layer)
        shared = settings.integer("share_expert_dim|share_expert_dims", "expert_shared_feed_forward_length")
        kind = Experts(activation="silu", clamped=own)
        return moe_node(make, name, hidden, width, eps, routing, shared, shared_clamped=shared_own, kind=kind)

    return decoder_graph(make, "gqa_moe", attention, ffn)


LIMITS = (("swiglu_limits", "swiglu_clamp_exp"), ("swiglu_limits_shared", "swiglu_clamp_shexp"))
"""Keys of the limits of routed experts, and of shared ones and dense layers."""


def _limit(s: Settings, layer: int, hf: str, gguf: str) -> ClampedGLU | None:
    """The limit after the activation; 0 and null stand for none."""
    value: Any = s.get("", gguf, layer=layer) if s.gguf else 0
    if not s.gguf and s.sequence(hf):
        listed = s.sequence(hf)
        if layer >= len(listed):
            raise s.error(f"{hf} has {len(listed)} items, none for layer {layer}")
        value = listed[layer] or 0
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < 1e30:
        raise s.error(f"{gguf if s.gguf else hf} says {value!r} of layer {layer}, a number from 0 up is needed")
    return ClampedGLU(1.0, float(value), 0.0, after=True) if value else None


def _spread(s: Settings, dim: int) -> float:
    """What the softmax divides by the root of."""
    return s.number("query_pre_attn_scalar", "", without=dim, derived=dim, positive=True)


def _slides(s: Settings, layer: int) -> bool:
    if s.gguf:
        return bool(s.get("", "attention.sliding_window_pattern", layer=layer))
    return kind_of(s, layer, FULL) == SLIDING


def _heads(s: Settings, layer: int, slides: bool) -> Heads:
    query = s.integer(*HEADS, layer=layer)
    if s.gguf:
        keys, dim = s.integer(*KV_HEADS, derived=query, layer=layer), s.integer("", "attention.key_length")
    else:
        keys, dim = s.integer("num_key_value_heads|num_attention_groups", ""), s.integer("head_dim", "")
        own = own_settings(s, layer, ("num_attention_heads",))
        if own is not None:
            query = own_count(s, own, "num_attention_heads", query)
        elif slides:
            query = s.integer("num_sliding_attention_heads", "", least=0) or _other_heads(s, query, keys, dim)
    check_heads(s, query, keys)
    return Heads(query, keys, dim)


def _other_heads(s: Settings, query: int, keys: int, dim: int) -> int:
    """Query heads of windows as published files say it; their key heads and widths are the others'."""
    other = s.given(OTHER) or {}
    if not isinstance(other, Mapping):
        raise s.error(f"{OTHER} is {other!r}, an object of settings is needed")
    for key, value in (("num_attention_groups", keys), ("head_dim", dim), ("attention_type", SLIDING)):
        if other.get(key, value) != value:
            raise s.error(f"{OTHER} has {key} {other[key]!r}, which differs from {value!r}")
    return own_count(s, other, "num_attention_heads", query)


def _is_dense(make: NodeMaker, name: str, layer: int) -> bool:
    s = make.settings
    if s.gguf:
        return not make.has(f"{name}.router")
    kinds, listed = s.sequence("mlp_layer_types"), s.given("moe_layers_enum")
    if not kinds:
        if listed is None:
            return layer < FIRST_SPARSE
        items = listed.split(",") if isinstance(listed, str) else listed
        if not isinstance(items, list) or not all(str(item).strip().isdigit() for item in items if str(item).strip()):
            raise s.error(f"moe_layers_enum is {listed!r}, layers are needed, as a list or with commas between them")
        return str(layer) not in {str(item).strip() for item in items}
    kind = kinds[layer] if layer < len(kinds) else None
    if kind not in ("dense", "sparse"):
        raise s.error(f"mlp_layer_types says {kind!r} of layer {layer}", "known: dense, sparse")
    return bool(kind == "dense")


def _rope(make: NodeMaker, name: str, layer: int, slides: bool, dim: int) -> Node:
    s = make.settings
    if not s.gguf:
        section = section_of(s, _rope_values(s, layer, slides))
        return rope_node(make, name, dim, "half", partial=True, section=section)
    whole = s.integer("", "rope.dimension_count", derived=dim)
    if slides:
        width = s.integer("", "rope.dimension_count_swa", derived=whole)
        return rope_node(make, name, width, "half", divisors=False, keys=("rope.freq_base_swa", ""))
    # the architecture turns half of what the file says, and its tensor of divisors goes on with ones
    return rope_node(make, name, whole // 2, "half", keys=("rope.freq_base", ""))


def _rope_values(s: Settings, layer: int, slides: bool) -> Mapping[str, Any]:
    """By kind of layer as transformers 5 writes it, or listed layer by layer as published files have it."""
    found = s.given("rope_parameters")
    kind = SLIDING if slides else FULL
    # by kind for all kinds that there are, or for none
    kinds = {kind_of(s, i, FULL) for i in range(s.layers())}
    if isinstance(found, Mapping) and all(isinstance(found.get(used), Mapping) for used in kinds):
        own: Mapping[str, Any] = found[kind]
        return own
    values: dict[str, Any] = {}
    for key, name in (("rope_theta", "rope_theta"), ("partial_rotary_factors", "partial_rotary_factor")):
        value = s.given(key)
        if isinstance(value, list):
            if layer >= len(value):
                raise s.error(f"{key} has {len(value)} items, none for layer {layer}")
            value = value[layer]
        if value is not None:
            values[name] = value
    scaling = s.given("rope_scaling") or {}
    if not isinstance(scaling, Mapping):
        raise s.error(f"rope_scaling is {scaling!r}, a mapping or null is needed")
    return values if slides else {**values, **scaling}
