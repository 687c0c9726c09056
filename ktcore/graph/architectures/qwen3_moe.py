"""Qwen3-MoE: attention with norms over q and k heads, routed experts without a shared one."""

from __future__ import annotations

from ktcore.graph.attention import gqa_node
from ktcore.graph.decoder import decoder_graph, rms_eps
from ktcore.graph.defaults import DERIVED, Defaults
from ktcore.graph.experts import Routing, moe_node
from ktcore.graph.maker import NodeMaker
from ktcore.graph.names import ATTENTION, MOE
from ktcore.graph.node import Graph, Node
from ktcore.graph.settings import Settings
from ktcore.graph.windows import switched_window

DEFAULTS = Defaults(
    hub={
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
        "rope_theta": 10000.0,
        "num_key_value_heads": 4,
        "head_dim": DERIVED,
        "attention_bias": False,
        "use_sliding_window": False,
        "sliding_window": 4096,
        "mlp_only_layers": None,
        "decoder_sparse_step": 1,
        "num_experts_per_tok": 8,
        "norm_topk_prob": False,
    },
    null={"sliding_window": 0, "mlp_only_layers": []},
    # the key is never written, and all engines renormalise
    gguf={"expert_weights_norm": True},
    biases=dict.fromkeys("qkvo", "attention_bias"),
)
"""Of `Qwen3MoeConfig`, whose models take head_dim from the sizes where it is absent; and of `qwen3moe` in llama.cpp."""


def build_qwen3_moe(settings: Settings) -> Graph:
    """`qwen3_moe` of hub folders, `qwen3moe` of GGUF files."""
    settings = settings.under(DEFAULTS)
    make = NodeMaker(settings, {**ATTENTION, **MOE})
    hidden = settings.integer("hidden_size", "embedding_length")
    routing = Routing(
        experts=settings.integer("num_experts|num_local_experts", "expert_count"),
        top_k=settings.integer("num_experts_per_tok", "expert_used_count"),
        renormalise=settings.flag("norm_topk_prob", "expert_weights_norm"),
        scale=settings.number("", "expert_weights_scale", without=1.0) or 1.0,
    )

    def attention(name: str, layer: int) -> Node:
        return gqa_node(make, name, layer, "half", qk_norm=True, window=switched_window(settings))

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
    return (layer + 1) % settings.integer("decoder_sparse_step", "", without=1) == 0
