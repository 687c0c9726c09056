"""Gemma-4: windows, and wide global layers whose values are keys; experts beside a dense part with norms of its own."""

from __future__ import annotations

from dataclasses import dataclass

from ktcore.graph.attention import HEADS, KV_HEADS, Heads, attention_node, check_heads
from ktcore.graph.decoder import decoder_graph, rms_eps
from ktcore.graph.defaults import Defaults
from ktcore.graph.experts import Experts, Routing, experts_node, router_node
from ktcore.graph.layerwise import FULL, SLIDING, kind_of, own_count, own_settings
from ktcore.graph.maker import NodeMaker
from ktcore.graph.names import ATTENTION, MOE, NameTable
from ktcore.graph.node import Graph, Node
from ktcore.graph.rotary import kind_section, rope_node
from ktcore.graph.settings import Settings
from ktcore.ops.moe import MoESpec
from ktcore.ops.norm import RMSNormSpec

NAMES: NameTable = {
    "attn.post_norm": ("post_attention_layernorm", "post_attention_norm"),
    "ffn.norm": ("pre_feedforward_layernorm", "ffn_norm"),
    "ffn.post_norm": ("post_feedforward_layernorm", "post_ffw_norm"),
    "ffn.out_scale": ("layer_scalar", "layer_output_scale"),
}
BESIDE: NameTable = {
    "ffn.norm": ("pre_feedforward_layernorm_2", "pre_ffw_norm_2"),
    "ffn.routed_norm": ("post_feedforward_layernorm_2", "post_ffw_norm_2"),
    "ffn.router": ("router.proj", "ffn_gate_inp"),
    "ffn.router_norm": ("router.scale", "ffn_gate_inp.scale"),
    "ffn.router.expert_scale": ("router.per_expert_scale", "ffn_down_exps.scale"),
    "ffn.experts.gate": ("experts.{}.gate_proj", "ffn_gate_exps"),
    "ffn.experts.up": ("experts.{}.up_proj", "ffn_up_exps"),
    "ffn.experts.down": ("experts.{}.down_proj", "ffn_down_exps"),
    "ffn.experts.fused_gate_up": ("experts.gate_up_proj", "ffn_gate_up_exps.weight"),
    "ffn.experts.fused_down": ("experts.down_proj", "ffn_down_exps.weight"),
    "ffn.shared.norm": ("pre_feedforward_layernorm", "ffn_norm"),
    "ffn.shared.gate": ("mlp.gate_proj", "ffn_gate"),
    "ffn.shared.up": ("mlp.up_proj", "ffn_up"),
    "ffn.shared.down": ("mlp.down_proj", "ffn_down"),
    "ffn.shared.post_norm": ("post_feedforward_layernorm_1", "post_ffw_norm_1"),
}
"""Of layers that have experts beside their dense part."""
ACTIVATION = "gelu_tanh"

DEFAULTS = Defaults(
    hub={
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": True,
        "rope_parameters": {
            SLIDING: {"rope_type": "default", "rope_theta": 10000.0},
            FULL: {"rope_type": "proportional", "partial_rotary_factor": 0.25, "rope_theta": 1000000.0},
        },
        "partial_rotary_factor": 1.0,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "global_head_dim": 512,
        "num_global_key_value_heads": None,
        "attention_k_eq_v": False,
        "attention_bias": False,
        "sliding_window": 512,
        "layer_types": None,
        "enable_moe_block": False,
        "num_kv_shared_layers": 0,
        "hidden_size_per_layer_input": 256,
        "final_logit_softcapping": None,
    },
    null={"layer_types": [], "num_global_key_value_heads": 0, "final_logit_softcapping": 0.0},
    gguf={
        "final_logit_softcapping": 30.0,
        "attention.shared_kv_layers": 0,
        "embedding_length_per_layer_input": 0,
        "rope.freq_base_swa": 10000.0,
    },
    biases=dict.fromkeys("qkvo", "attention_bias"),
    only={"hidden_activation": ("gelu_pytorch_tanh",), "use_bidirectional_attention": (None, "vision")},
)
"""Of `Gemma4TextConfig` in transformers, and of `gemma4` in llama.cpp."""


@dataclass(frozen=True)
class _Layer:
    """One layer's attention: whether it slides, and its heads."""

    slides: bool
    heads: Heads


def build_gemma4(settings: Settings) -> Graph:
    """`gemma4_text` of hub folders, alone or as a part, `gemma4` of GGUF files."""
    settings = settings.under(DEFAULTS)
    _refuse_small(settings)
    names = {**ATTENTION, **MOE, **NAMES}
    make = NodeMaker(settings, names)
    beside = make.has("layers.0.ffn.router") if settings.gguf else settings.flag("enable_moe_block", "")
    if beside:
        make = NodeMaker(settings, {**names, **BESIDE})
    hidden, eps = settings.integer("hidden_size", "embedding_length"), rms_eps(make)

    def attention(name: str, layer: int) -> Node:
        kind = _layer(settings, layer)
        equal = settings.flag("attention_k_eq_v", "", without=True) and not kind.slides
        return attention_node(
            make,
            name,
            kind.heads,
            _rope(make, f"{name}.rope", kind),
            norms="head",
            post_norm=True,
            window=settings.integer("sliding_window", "attention.sliding_window") if kind.slides else 0,
            scale=1.0,
            value_norm=True,
            values_are_keys=equal and not (settings.gguf and make.has(f"{name}.v")),
        )

    def ffn(name: str, layer: int) -> Node:
        dense = settings.integer("intermediate_size", "feed_forward_length", layer=layer)
        if beside:
            return _beside_experts(make, name, hidden, dense, eps)
        scaled = not settings.gguf or make.has(f"{name}.out_scale")
        return make.mlp(name, hidden, dense, eps=eps, post_norm=True, activation=ACTIVATION, out_scale=scaled)

    softcap = settings.number("final_logit_softcapping", "final_logit_softcapping")
    family = "gqa_moe" if beside else "dense"
    return decoder_graph(make, family, attention, ffn, embed_scale=hidden**0.5, softcap=softcap)


def _beside_experts(make: NodeMaker, name: str, hidden: int, dense: int, eps: float) -> Node:
    """The router and both parts read x, each through a norm of its own; their results have norms of their own, too."""
    s = make.settings
    routing = Routing(
        experts=s.integer("num_experts|num_local_experts", "expert_count"),
        top_k=s.integer("top_k_experts|num_experts_per_tok", "expert_used_count"),
        renormalise=True,
        expert_scale=True,
    )
    width = s.integer("moe_intermediate_size|expert_intermediate_size", "expert_feed_forward_length")
    scale = make.ref(f"{name}.router_norm", (hidden,), "")
    router_norm = RMSNormSpec(hidden, eps, scale.format, scale=hidden**-0.5)
    scaled = not s.gguf or make.has(f"{name}.out_scale")
    kind = Experts(activation=ACTIVATION)
    return make.composite(
        name,
        MoESpec,
        {
            "router": router_node(make, f"{name}.router", hidden, routing),
            "experts": experts_node(make, f"{name}.experts", hidden, width, routing, kind),
            "shared": make.mlp(
                f"{name}.shared", hidden, dense, eps=eps, post_norm=True, activation=ACTIVATION, residual=False
            ),
            "norm": make.norm(f"{name}.norm", hidden, eps),
            "router_norm": make.node(f"{name}.router_norm", router_norm, {"weight": scale}),
            "routed_norm": make.norm(f"{name}.routed_norm", hidden, eps),
            "post_norm": make.norm(f"{name}.post_norm", hidden, eps),
        },
        {"out_scale": make.ref(f"{name}.out_scale", (1,), make.plain_suffix)} if scaled else None,
        hidden=hidden,
        shared_apart=True,
        out_scale=scaled,
    )


def _layer(s: Settings, layer: int) -> _Layer:
    query = s.integer(*HEADS, layer=layer)
    if s.gguf:
        slides = bool(s.get("", "attention.sliding_window_pattern", layer=layer))
        dim = s.integer("", "attention.key_length_swa" if slides else "attention.key_length")
        keys = s.integer(*KV_HEADS, derived=query, layer=layer)
    else:
        slides = _slides(s, layer)
        keys, dim = s.integer("num_key_value_heads", ""), s.integer("head_dim", "")
        own = own_settings(s, layer, ("head_dim", "num_key_value_heads"))
        if own is not None:
            keys, dim = own_count(s, own, "num_key_value_heads", keys), own_count(s, own, "head_dim", dim)
        elif not slides:
            dim = s.integer("global_head_dim", "")
            fewer = s.integer("num_global_key_value_heads", "", least=0)
            keys = fewer if fewer and s.flag("attention_k_eq_v", "") else keys
    check_heads(s, query, keys)
    return _Layer(slides, Heads(query, keys, dim))


def _slides(s: Settings, layer: int) -> bool:
    """Five of six, and never the last."""
    if layer == s.layers() - 1:
        return False
    return kind_of(s, layer, SLIDING if (layer + 1) % 6 else FULL) == SLIDING


def _rope(make: NodeMaker, name: str, kind: _Layer) -> Node:
    s = make.settings
    if not s.gguf:
        section = kind_section(s, SLIDING if kind.slides else FULL)
        return rope_node(make, name, kind.heads.dim, "half", section=section)
    keys = ("rope.freq_base", "rope.dimension_count")
    if kind.slides:
        keys = ("rope.freq_base_swa", "rope.dimension_count_swa")
    return rope_node(make, name, kind.heads.dim, "half", partial=True, divisors=not kind.slides, keys=keys)


def _refuse_small(s: Settings) -> None:
    """What small models have and nothing here computes: a second embedding for every layer, layers that share keys."""
    for hf, gguf in (
        ("hidden_size_per_layer_input", "embedding_length_per_layer_input"),
        ("num_kv_shared_layers", "attention.shared_kv_layers"),
    ):
        value = s.integer(hf, gguf, least=0)
        if value:
            raise s.error(
                f"{gguf if s.gguf else hf} is {value}, which architecture '{s.architecture}' is not known to do here",
                "the small models of the family, and a config.json that leaves the key out, have such layers",
            )
