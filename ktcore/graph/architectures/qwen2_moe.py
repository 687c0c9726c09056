"""Qwen2-MoE and Qwen1.5-MoE: attention with biases, routed experts beside a shared one that a learnt gate scales."""

from __future__ import annotations

from ktcore.graph.architectures.qwen3_moe import has_experts
from ktcore.graph.attention import gqa_node, marked_sliding
from ktcore.graph.decoder import decoder_graph, rms_eps
from ktcore.graph.experts import Routing, moe_node
from ktcore.graph.maker import NodeMaker
from ktcore.graph.names import ATTENTION, MOE, SHARED_EXPERT
from ktcore.graph.node import Graph, Node
from ktcore.graph.settings import Settings


def build_qwen2_moe(settings: Settings) -> Graph:
    """`qwen2_moe` of hub folders, `qwen2moe` of GGUF files."""
    make = NodeMaker(settings, {**ATTENTION, **MOE, **SHARED_EXPERT})
    hidden = settings.integer("hidden_size", "embedding_length")
    routing = Routing(
        experts=settings.integer("num_experts|num_local_experts", "expert_count"),
        top_k=settings.integer("num_experts_per_tok", "expert_used_count"),
        renormalise=bool(settings.get("norm_topk_prob", "expert_weights_norm", False)),
        scale=settings.number("", "expert_weights_scale", 1.0) or 1.0,
    )

    def attention(name: str, layer: int) -> Node:
        return gqa_node(make, name, layer, "half", window=_window(settings, layer))

    def ffn(name: str, layer: int) -> Node:
        dense = settings.integer("intermediate_size", "feed_forward_length", layer=layer)
        if not has_experts(make, name, layer):
            return make.mlp(name, hidden, dense, eps=rms_eps(make))
        # files from before the two keys have one width for all chosen experts together
        width = settings.integer("moe_intermediate_size", "expert_feed_forward_length", dense // routing.top_k)
        shared = settings.integer("shared_expert_intermediate_size", "expert_shared_feed_forward_length", dense)
        return moe_node(make, name, hidden, width, rms_eps(make), routing, shared, shared_gate=True)

    return decoder_graph(make, "gqa_moe", attention, ffn)


def _window(s: Settings, layer: int) -> int:
    """Sliding window of hub configs, off in all releases: every other of the first `max_window_layers` layers."""
    window = s.integer("sliding_window", "", 0, least=0)
    if not window or not s.get("use_sliding_window", "", False):
        return 0
    marked = marked_sliding(s, layer)
    if marked is not None:
        return window if marked else 0
    return window if layer % 2 == 0 and layer < s.integer("max_window_layers", "", 28, least=0) else 0
