"""OLMoE: attention with a norm over all heads of q and one over those of k, softmax-routed experts in every layer."""

from __future__ import annotations

from ktcore.graph.attention import gqa_node
from ktcore.graph.decoder import decoder_graph, rms_eps
from ktcore.graph.defaults import DERIVED, Defaults
from ktcore.graph.experts import Routing, moe_node
from ktcore.graph.maker import NodeMaker
from ktcore.graph.names import ATTENTION, MOE
from ktcore.graph.node import Graph, Node
from ktcore.graph.settings import Settings

DEFAULTS = Defaults(
    hub={
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
        "rope_theta": 10000.0,
        "num_key_value_heads": None,
        "head_dim": DERIVED,
        "attention_bias": False,
        "num_experts_per_tok": 8,
        "norm_topk_prob": False,
    },
    null={"num_key_value_heads": DERIVED},
    # llama.cpp never renormalises here
    gguf={"expert_weights_norm": False},
    biases=dict.fromkeys("qkvo", "attention_bias"),
)
"""Of `OlmoeConfig` in transformers, and of `olmoe` in llama.cpp."""


def build_olmoe(settings: Settings) -> Graph:
    """`olmoe` of hub folders and of GGUF files."""
    settings = settings.under(DEFAULTS)
    make = NodeMaker(settings, {**ATTENTION, **MOE})
    hidden = settings.integer("hidden_size", "embedding_length")
    routing = Routing(
        experts=settings.integer("num_experts|num_local_experts", "expert_count"),
        top_k=settings.integer("num_experts_per_tok", "expert_used_count"),
        renormalise=settings.flag("norm_topk_prob", "expert_weights_norm"),
    )

    def attention(name: str, layer: int) -> Node:
        return gqa_node(make, name, layer, "half", whole_norm=True)

    def ffn(name: str, layer: int) -> Node:
        width = settings.integer("intermediate_size", "feed_forward_length", layer=layer)
        return moe_node(make, name, hidden, width, rms_eps(make), routing)

    return decoder_graph(make, "gqa_moe", attention, ffn)
