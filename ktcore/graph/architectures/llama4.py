"""LLaMA 4's text model: attention in chunks, every fourth layer without positions over all; sigmoid-scaled experts."""

from __future__ import annotations

from ktcore.graph.attention import gqa_node
from ktcore.graph.decoder import decoder_graph, rms_eps
from ktcore.graph.defaults import Defaults
from ktcore.graph.experts import Experts, Routing, moe_node
from ktcore.graph.maker import NodeMaker
from ktcore.graph.names import ATTENTION, MOE, NameTable
from ktcore.graph.node import Graph, Node
from ktcore.graph.settings import Settings
from ktcore.ops.attention import Temperature

NAMES: NameTable = {
    "ffn.gate": ("feed_forward.gate_proj", "ffn_gate"),
    "ffn.up": ("feed_forward.up_proj", "ffn_up"),
    "ffn.down": ("feed_forward.down_proj", "ffn_down"),
    "ffn.gate_up": ("feed_forward.gate_up_proj", "ffn_up"),
    "ffn.router": ("feed_forward.router", "ffn_gate_inp"),
    "ffn.experts.fused_gate_up": ("feed_forward.experts.gate_up_proj", "ffn_gate_up_exps.weight"),
    "ffn.experts.fused_down": ("feed_forward.experts.down_proj", "ffn_down_exps.weight"),
    "ffn.shared.gate": ("feed_forward.shared_expert.gate_proj", "ffn_gate_shexp"),
    "ffn.shared.up": ("feed_forward.shared_expert.up_proj", "ffn_up_shexp"),
    "ffn.shared.down": ("feed_forward.shared_expert.down_proj", "ffn_down_shexp"),
}
SPAN = 8192  # of chunks and of the temperature's steps, where a file does not say: the released models'
WITHOUT_NORM = 128  # GGUF has no key for the norms of q and k: Maverick, known by its experts, has none

DEFAULTS = Defaults(
    hub={
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
        "rope_theta": 500000.0,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "attention_bias": False,
        "num_experts_per_tok": 1,
        "moe_layers": None,
        "interleave_moe_layer_step": 1,
        "use_qk_norm": True,
        "no_rope_layers": None,
        "no_rope_layer_interval": 4,
        "attention_chunk_size": SPAN,
        "layer_types": None,
        "attn_temperature_tuning": True,
        "floor_scale": SPAN,
        "attn_scale": 0.1,
    },
    null={"attention_chunk_size": 0, "layer_types": [], "no_rope_layers": [], "moe_layers": None},
    gguf={"attention.sliding_window": SPAN},
    biases=dict.fromkeys("qkvo", "attention_bias"),
)
"""Of `Llama4TextConfig` in transformers, and of `llama4` in llama.cpp."""


def build_llama4(settings: Settings) -> Graph:
    """`llama4_text` of hub folders, alone or as a part, `llama4` of GGUF files."""
    settings = settings.under(DEFAULTS)
    make = NodeMaker(settings, {**ATTENTION, **MOE, **NAMES})
    hidden = settings.integer("hidden_size", "embedding_length")
    experts = settings.integer("num_local_experts", "expert_count")
    routing = Routing(
        experts=experts,
        top_k=settings.integer("num_experts_per_tok", "expert_used_count"),
        score="sigmoid",
        on_logits=True,
    )
    kind = Experts(input_major=True, weight_on_input=True)
    # GGUF files hold neither of these
    qk_norm = settings.flag("use_qk_norm", "", without=experts != WITHOUT_NORM)
    span = settings.integer("attention_chunk_size", "attention.sliding_window", least=0)
    tuned = settings.flag("attn_temperature_tuning", "", without=True)
    scale, floor = (settings.number(key, "", without=DEFAULTS.hub[key]) for key in ("attn_scale", "floor_scale"))

    def attention(name: str, layer: int) -> Node:
        rotary = _rotary(settings, layer, span)
        chunk = _chunk(settings, layer, span, rotary)
        if rotary:
            return gqa_node(make, name, layer, "interleaved", chunk=chunk, unit_norm=qk_norm)
        return gqa_node(make, name, layer, None, chunk=chunk, temperature=Temperature(scale, floor) if tuned else None)

    def ffn(name: str, layer: int) -> Node:
        if not _sparse(settings, layer):
            width = settings.integer("intermediate_size_mlp", "feed_forward_length", layer=layer)
            return make.mlp(name, hidden, width, eps=rms_eps(make))
        width = settings.integer("intermediate_size", "expert_feed_forward_length")
        return moe_node(make, name, hidden, width, rms_eps(make), routing, width, kind=kind)

    return decoder_graph(make, "gqa_moe", attention, ffn)


def _rotary(s: Settings, layer: int, span: int) -> bool:
    """Whether a layer rotates q and k; `no_rope_layers` holds 1 for those that do."""
    if s.gguf and span == 0:
        return True
    listed = s.sequence("no_rope_layers")
    if not listed:
        return (layer + 1) % s.integer("no_rope_layer_interval", "", without=4) != 0
    if layer >= len(listed):
        raise s.error(f"no_rope_layers has {len(listed)} items, none for layer {layer}")
    return bool(listed[layer])


def _chunk(s: Settings, layer: int, span: int, rotary: bool) -> int:
    """Positions of a chunk that the layer attends within: the rotating ones, unless `layer_types` says otherwise."""
    kinds = s.sequence("layer_types")
    if not kinds:
        return span if rotary else 0
    kind = kinds[layer] if layer < len(kinds) else None
    if kind not in ("chunked_attention", "full_attention") or (kind == "chunked_attention" and not span):
        raise s.error(
            f"layer_types says {kind!r} of layer {layer}, beside attention_chunk_size {span}",
            "known: full_attention, and chunked_attention where there is a chunk size",
        )
    return span if kind == "chunked_attention" else 0


def _sparse(s: Settings, layer: int) -> bool:
    if s.get("moe_layers", "", without=None) is not None:
        return layer in s.sequence("moe_layers")
    return (layer + 1) % s.integer("interleave_moe_layer_step", "interleave_moe_layer_step") == 0
