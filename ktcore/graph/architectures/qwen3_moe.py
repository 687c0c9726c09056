"""Qwen3-MoE: attention with norms over q and k heads, routed experts without a shared one."""

from __future__ import annotations

from ktcore.graph.attention import gqa_node
from ktcore.graph.decoder import decoder_graph, rms_eps
from ktcore.graph.experts import Routing, moe_node
from ktcore.graph.maker import NodeMaker
from ktcore.graph.names import ATTENTION, MOE
from ktcore.graph.node import Graph, Node
from ktcore.graph.settings import Settings


def build_qwen3_moe(settings: Settings) -> Graph:
    """`qwen3_moe` of hub folders, `qwen3moe` of GGUF files."""
    make = NodeMaker(settings, {**ATTENTION, **MOE})
    hidden = settings.integer("hidden_size", "embedding_length")
    routing = Routing(
        experts=settings.integer("num_experts|num_local_experts", "expert_count"),
        top_k=settings.integer("num_experts_per_tok", "expert_used_count"),
        # the hub's default is False, while GGUF files are read as True by all engines: the key is never written
        renormalise=bool(settings.get("norm_topk_prob", "expert_weights_norm", settings.gguf)),
        scale=settings.number("", "expert_weights_scale", 1.0) or 1.0,
    )

    def attention(name: str, layer: int) -> Node:
        return gqa_node(make, name, layer, "half", qk_norm=True)

    def ffn(name: str, layer: int) -> Node:
        if not has_experts(make, name, layer):
            width = settings.integer("intermediate_size", "feed_forward_length", layer=layer)
            return make.mlp(name, hidden, width, eps=rms_eps(make))
        width = settings.integer("moe_intermediate_size", "expert_feed_forward_length", layer=layer)
        return moe_node(make, name, hidden, width, rms_eps(make), routing)

    return decoder_graph(make, "qwen3_moe", attention, ffn)


def has_experts(make: NodeMaker, name: str, layer: int) -> bool:
    """Whether a layer has experts: GGUF has no key for it, so the tensors tell."""
    settings = make.settings
    if settings.gguf:
        return make.has(f"{name}.router")
    if layer in settings.sequence("mlp_only_layers"):
        return False
    return (layer + 1) % settings.integer("decoder_sparse_step", "", 1) == 0
