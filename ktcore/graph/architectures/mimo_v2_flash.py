"""MiMo-V2-Flash: keys wider than values, windows with sinks and twice the key heads, sigmoid-routed experts alone."""

from __future__ import annotations

from ktcore.graph.attention import HEADS, KV_HEADS, Heads, attention_node, check_heads
from ktcore.graph.decoder import decoder_graph, rms_eps
from ktcore.graph.defaults import DERIVED, Defaults
from ktcore.graph.experts import Routing, moe_node
from ktcore.graph.layerwise import FULL, SLIDING, kind_of
from ktcore.graph.maker import NodeMaker
from ktcore.graph.names import ATTENTION, MOE, NameTable
from ktcore.graph.node import Graph, Node
from ktcore.graph.rotary import kind_section, rope_node
from ktcore.graph.settings import Settings

NAMES: NameTable = {"attn.sinks": ("self_attn.attention_sink_bias", "attn_sinks")}
PART = 0.334

DEFAULTS = Defaults(
    hub={
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
        "rope_parameters": {
            FULL: {"rope_type": "default", "rope_theta": 5000000.0, "partial_rotary_factor": PART},
            SLIDING: {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": PART},
        },
        "partial_rotary_factor": PART,
        "num_attention_heads": 64,
        "num_key_value_heads": 4,
        "head_dim": 192,
        "v_head_dim": 128,
        "attention_bias": False,
        "attention_value_scale": 0.707,
        "sliding_window_size": None,
        "sliding_window": 129,
        "layer_types": None,
        "mlp_layer_types": None,
        "num_experts_per_tok": 8,
        "n_group": 1,
        "topk_group": 1,
        "norm_topk_prob": True,
        "routed_scaling_factor": 1.0,
    },
    null={
        "layer_types": [],
        "mlp_layer_types": [],
        "sliding_window_size": 0,
        "attention_value_scale": 1.0,
        "routed_scaling_factor": 1.0,
    },
    gguf={"attention.value_scale": 1.0, "rope.freq_base_swa": 10000.0, "attention.value_length": DERIVED},
    biases=dict.fromkeys("qkv", "attention_bias"),
    only={
        "scoring_func": ("sigmoid",),
        "topk_method": ("noaux_tc",),
        "n_shared_experts": (None, 0),
        "add_swa_attention_sink_bias": (True,),
        "add_full_attention_sink_bias": (False,),
        "layernorm_epsilon": (1e-5,),
    },
    left_out={"model.mtp.": "layers that predict further tokens"},
)
"""Of `MiMoV2FlashConfig` in transformers, which does not read the keys of `only`, and of `mimo2` in llama.cpp."""


def build_mimo_v2_flash(settings: Settings) -> Graph:
    """`mimo_v2_flash` of hub folders, `mimo2` of GGUF files."""
    settings = settings.under(DEFAULTS)
    _refuse_other_windows(settings)
    make = NodeMaker(settings, {**ATTENTION, **MOE, **NAMES})
    hidden = settings.integer("hidden_size", "embedding_length")
    routing = Routing(
        experts=settings.integer("n_routed_experts|num_local_experts", "expert_count"),
        top_k=settings.integer("num_experts_per_tok", "expert_used_count"),
        score="sigmoid",
        choice_bias=True,
        groups=settings.integer("n_group", "", without=1),
        groups_kept=settings.integer("topk_group", "", without=1),
        group_score="top2_sum",
        renormalise=settings.flag("norm_topk_prob", "", without=True),
        renorm_eps=1e-20,
        scale=settings.number("routed_scaling_factor", "expert_weights_scale") or 1.0,
    )

    def attention(name: str, layer: int) -> Node:
        slides = _slides(settings, layer)
        return attention_node(
            make,
            name,
            _heads(settings, layer, slides),
            _rope(make, f"{name}.rope", slides),
            window=_window(settings) if slides else 0,
            sinks=make.has(f"{name}.sinks", ".weight") if settings.gguf else slides,
            value_scale=settings.number("attention_value_scale", "attention.value_scale"),
        )

    def ffn(name: str, layer: int) -> Node:
        if _is_dense(make, name, layer):
            width = settings.integer("intermediate_size", "feed_forward_length", layer=layer)
            return make.mlp(name, hidden, width, eps=rms_eps(make))
        width = settings.integer("moe_intermediate_size", "expert_feed_forward_length", layer=layer)
        return moe_node(make, name, hidden, width, rms_eps(make), routing)

    return decoder_graph(make, "gqa_moe", attention, ffn)


def _heads(s: Settings, layer: int, slides: bool) -> Heads:
    query = s.integer(*HEADS, layer=layer)
    if s.gguf:
        keys = s.integer(*KV_HEADS, derived=query, layer=layer)
        dim = s.integer("", "attention.key_length", derived=s.integer("", "embedding_length") // query)
        value = s.integer("", "attention.value_length", derived=dim)
    else:
        keys = s.integer("num_key_value_heads", "") * (2 if slides else 1)
        dim, value = s.integer("head_dim", ""), s.integer("v_head_dim", "")
    check_heads(s, query, keys)
    return Heads(query, keys, dim, value)


def _slides(s: Settings, layer: int) -> bool:
    """All but the first and every sixth, where nothing else is said."""
    if s.gguf:
        return bool(s.get("", "attention.sliding_window_pattern", layer=layer))
    usual = FULL if layer == 0 or (layer + 1) % 6 == 0 else SLIDING
    pattern = s.given("hybrid_layer_pattern")
    if pattern is not None and s.given("layer_types") is None:
        usual = _marked(s, "hybrid_layer_pattern", pattern, layer, (FULL, SLIDING))
    return kind_of(s, layer, usual) == SLIDING


def _window(s: Settings) -> int:
    """Tokens that a query sees, itself among them: one more than `sliding_window_size`, as transformers has it."""
    size = s.integer("sliding_window_size", "", least=0, without=0)
    return size + 1 if size else s.integer("sliding_window", "attention.sliding_window")


def _is_dense(make: NodeMaker, name: str, layer: int) -> bool:
    s = make.settings
    if s.gguf:
        return not make.has(f"{name}.router")
    kinds, marks = s.sequence("mlp_layer_types"), s.given("moe_layer_freq")
    if kinds:
        kind = kinds[layer] if layer < len(kinds) else None
    else:
        kind = "dense" if layer == 0 else "sparse"
        if isinstance(marks, list):
            kind = _marked(s, "moe_layer_freq", marks, layer, ("dense", "sparse"))
    if kind not in ("dense", "sparse"):
        raise s.error(f"mlp_layer_types says {kind!r} of layer {layer}", "known: dense, sparse")
    return bool(kind == "dense")


def _marked(s: Settings, key: str, marks: object, layer: int, kinds: tuple[str, str]) -> str:
    """Of a list of the hub's with 0 or 1 for each layer, what it says of one."""
    if not isinstance(marks, list) or layer >= len(marks) or marks[layer] not in (0, 1):
        raise s.error(f"{key} is {marks!r}, a list with 0 or 1 for layer {layer} is needed")
    return kinds[marks[layer]]


def _rope(make: NodeMaker, name: str, slides: bool) -> Node:
    s = make.settings
    if not s.gguf:
        dim = s.integer("head_dim", "")
        return rope_node(make, name, dim, "half", partial=True, section=kind_section(s, SLIDING if slides else FULL))
    base = "rope.freq_base_swa" if slides else "rope.freq_base"
    dim = s.integer("", "attention.key_length", derived=s.integer("", "rope.dimension_count", derived=0, least=0))
    return rope_node(make, name, dim, "half", partial=True, keys=(base, "rope.dimension_count"))


def _refuse_other_windows(s: Settings) -> None:
    """Keys of the hub's files that transformers does not read must say what it takes for granted."""
    expected = {
        "swa_num_attention_heads": s.given("num_attention_heads"),
        "swa_head_dim": s.given("head_dim"),
        "swa_v_head_dim": s.given("v_head_dim"),
        "swa_num_key_value_heads": 2 * s.integer("num_key_value_heads", "", least=0, without=0),
        "swa_rope_theta": 10000,
    }
    if s.given("rope_parameters") is None:
        expected |= {"rope_theta": 5000000, "partial_rotary_factor": PART}
    for key, value in expected.items():
        found = s.given(key)
        if found is not None and found != value:
            raise s.error(
                f"{key} is {found!r}, which architecture '{s.architecture}' is not known to have beside {value}"
            )
