"""LLaMA 4's text model: attention in chunks, every fourth layer without positions over all; sigmoid-scaled experts."""

from __future__ import annotations

from ktcore.graph.attention import gqa_node
from ktcore.graph.decoder import decoder_graph, rms_eps
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


def build_llama4(settings: Settings) -> Graph:
    """`llama4_text` and `llama4` (its text part alone) of hub folders, `llama4` of GGUF files."""
    whole = not settings.gguf and "text_config" in settings.config
    if whole:
        settings = Settings(settings.checkpoint, settings.get("text_config", ""), settings.experts)
    make = NodeMaker(settings, {**ATTENTION, **MOE, **NAMES}, prefix="language_model." if whole else "")
    hidden = settings.integer("hidden_size", "embedding_length")
    experts = settings.integer("num_local_experts", "expert_count")
    routing = Routing(
        experts=experts,
        top_k=settings.integer("num_experts_per_tok", "expert_used_count"),
        score="sigmoid",
        on_logits=True,
    )
    kind = Experts(input_major=True, weight_on_input=True)
    qk_norm = experts != WITHOUT_NORM if settings.gguf else bool(settings.get("use_qk_norm", "", True))
    span = settings.integer("attention_chunk_size", "attention.sliding_window", SPAN if settings.gguf else 0, least=0)
    tuned = bool(settings.get("attn_temperature_tuning", "", True))
    temperature = Temperature(settings.number("attn_scale", "", 0.1), settings.number("floor_scale", "", float(SPAN)))

    def attention(name: str, layer: int) -> Node:
        if _rotary(settings, layer, span):
            return gqa_node(make, name, layer, "interleaved", window=0, chunk=span, unit_norm=qk_norm)
        return gqa_node(make, name, layer, None, window=0, temperature=temperature if tuned else None)

    def ffn(name: str, layer: int) -> Node:
        if not _sparse(settings, layer):
            width = settings.integer("intermediate_size_mlp", "feed_forward_length", layer=layer)
            return make.mlp(name, hidden, width, eps=rms_eps(make))
        width = settings.integer("intermediate_size", "expert_feed_forward_length")
        return moe_node(make, name, hidden, width, rms_eps(make), routing, width, kind=kind)

    return decoder_graph(make, "gqa_moe", attention, ffn)


def _rotary(s: Settings, layer: int, span: int) -> bool:
    """Whether a layer rotates q and k (and sees a chunk only); `no_rope_layers` holds 1 for those that do."""
    if s.gguf and span == 0:
        return True
    listed = s.sequence("no_rope_layers")
    if listed:
        return layer >= len(listed) or bool(listed[layer])
    return (layer + 1) % s.integer("no_rope_layer_interval", "", 4) != 0


def _sparse(s: Settings, layer: int) -> bool:
    listed = s.get("moe_layers", "", None)
    if listed is not None:
        return layer in s.sequence("moe_layers")
    return (layer + 1) % s.integer("interleave_moe_layer_step", "interleave_moe_layer_step", 1) == 0
