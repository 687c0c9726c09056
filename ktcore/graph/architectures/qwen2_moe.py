"""Qwen2-MoE and Qwen1.5-MoE: attention with biases, routed experts beside a shared one that a learnt gate scales."""

from __future__ import annotations

from ktcore.graph.architectures.qwen3_moe import has_experts
from ktcore.graph.attention import gqa_node
from ktcore.graph.decoder import decoder_graph, rms_eps
from ktcore.graph.defaults import DERIVED, Defaults
from ktcore.graph.experts import Routing, moe_node
from ktcore.graph.maker import NodeMaker
from ktcore.graph.names import ATTENTION, MOE, SHARED_EXPERT
from ktcore.graph.node import Graph, Node
from ktcore.graph.settings import Settings
from ktcore.graph.windows import marked_sliding, switched_window, wide_enough

DEFAULTS = Defaults(
    hub={
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
        "rope_theta": 10000.0,
        "num_key_value_heads": 16,
        "head_dim": DERIVED,
        "qkv_bias": True,
        "use_sliding_window": False,
        "sliding_window": 4096,
        "max_window_layers": 28,
        "layer_types": None,
        "mlp_only_layers": None,
        "decoder_sparse_step": 1,
        "num_experts_per_tok": 4,
        "norm_topk_prob": False,
        "moe_intermediate_size": 1408,
        "shared_expert_intermediate_size": 5632,
    },
    null={"layer_types": [], "mlp_only_layers": []},
    # files from before the two widths have one for all chosen experts together
    gguf={
        "expert_weights_norm": False,
        "expert_feed_forward_length": DERIVED,
        "expert_shared_feed_forward_length": DERIVED,
    },
    biases=dict.fromkeys("qkv", "qkv_bias"),
)
"""Of `Qwen2MoeConfig` in transformers, and of `qwen2moe` in llama.cpp."""


def build_qwen2_moe(settings: Settings) -> Graph:
    """`qwen2_moe` of hub folders, `qwen2moe` of GGUF files."""
    settings = settings.under(DEFAULTS)
    make = NodeMaker(settings, {**ATTENTION, **MOE, **SHARED_EXPERT})
    hidden = settings.integer("hidden_size", "embedding_length")
    routing = Routing(
        experts=settings.integer("num_experts|num_local_experts", "expert_count"),
        top_k=settings.integer("num_experts_per_tok", "expert_used_count"),
        renormalise=settings.flag("norm_topk_prob", "expert_weights_norm"),
        scale=settings.number("", "expert_weights_scale", without=1.0) or 1.0,
    )

    def attention(name: str, layer: int) -> Node:
        return gqa_node(make, name, layer, "half", window=_window(settings, layer))

    def ffn(name: str, layer: int) -> Node:
        dense = settings.integer("intermediate_size", "feed_forward_length", layer=layer)
        if not has_experts(make, name, layer):
            return make.mlp(name, hidden, dense, eps=rms_eps(make))
        width = settings.integer("moe_intermediate_size", "expert_feed_forward_length", derived=dense // routing.top_k)
        shared = settings.integer("shared_expert_intermediate_size", "expert_shared_feed_forward_length", derived=dense)
        return moe_node(make, name, hidden, width, rms_eps(make), routing, shared, shared_gate=True)

    return decoder_graph(make, "gqa_moe", attention, ffn)


def _window(s: Settings, layer: int) -> int:
    """Sliding window of hub configs, off in all releases: every other of the first `max_window_layers` layers."""
    window, marked = switched_window(s), marked_sliding(s, layer)
    if marked is None:
        marked = bool(window) and layer % 2 == 0 and layer < s.integer("max_window_layers", "", least=0)
    return wide_enough(s, window, layer) if marked else 0
