"""ERNIE-4.5 MoE: interleaved rotary pairs, softmax-routed experts that a bias helps to choose, ungated shared ones."""

from __future__ import annotations

from ktcore.graph.attention import gqa_node
from ktcore.graph.decoder import decoder_graph, rms_eps
from ktcore.graph.defaults import DERIVED, Defaults
from ktcore.graph.experts import Routing, moe_node
from ktcore.graph.maker import NodeMaker
from ktcore.graph.names import ATTENTION, MOE, NameTable
from ktcore.graph.node import Graph, Node
from ktcore.graph.settings import Settings

NAMES: NameTable = {"ffn.router.bias": ("mlp.moe_statics.e_score_correction_bias", "exp_probs_b.bias")}

DEFAULTS = Defaults(
    hub={
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": True,
        "rope_theta": 500000.0,
        "num_key_value_heads": 4,
        "head_dim": DERIVED,
        "use_bias": False,
        "moe_k": 6,
        "moe_num_shared_experts": 2,
        "moe_layer_start_index": 1,
        "moe_layer_end_index": -1,
        "moe_layer_interval": 1,
        "moe_intermediate_size": 1536,
    },
    null={"num_key_value_heads": DERIVED, "head_dim": DERIVED},
    gguf={"expert_shared_count": 0},
    biases=dict.fromkeys(("q", "k", "v", "o", "gate", "up", "down", "head"), "use_bias"),
    # the sum of the chosen is never below it, where softmax gives the scores
    only={"moe_norm_min": (1e-12,)},
    left_out={"model.mtp_": "layers that predict further tokens"},
)
"""Of `Ernie4_5_MoeConfig` in transformers, and of `ernie4_5-moe` in llama.cpp."""


def build_ernie4_5_moe(settings: Settings) -> Graph:
    """`ernie4_5_moe` of hub folders, `ernie4_5-moe` of GGUF files; neither permutes q and k."""
    settings = settings.under(DEFAULTS)
    make = NodeMaker(settings, {**ATTENTION, **MOE, **NAMES})
    hidden = settings.integer("hidden_size", "embedding_length")
    routing = Routing(
        experts=settings.integer("moe_num_experts|num_experts|num_local_experts", "expert_count"),
        top_k=settings.integer("moe_k|num_experts_per_tok", "expert_used_count"),
        choice_bias=True,
        renormalise=True,
    )
    shared = settings.integer("moe_num_shared_experts", "expert_shared_count", least=0)

    def attention(name: str, layer: int) -> Node:
        return gqa_node(make, name, layer, "interleaved")

    def ffn(name: str, layer: int) -> Node:
        if not _sparse(make, name, layer):
            width = settings.integer("intermediate_size", "feed_forward_length", layer=layer)
            return make.mlp(name, hidden, width, eps=rms_eps(make))
        width = settings.integer("moe_intermediate_size", "expert_feed_forward_length", layer=layer)
        return moe_node(make, name, hidden, width, rms_eps(make), routing, shared * width)

    return decoder_graph(make, "gqa_moe", attention, ffn)


def _sparse(make: NodeMaker, name: str, layer: int) -> bool:
    s = make.settings
    if s.gguf:
        return make.has(f"{name}.router")
    first = s.integer("moe_layer_start_index", "", least=0)
    last = s.integer("moe_layer_end_index", "", least=-1)
    every = s.integer("moe_layer_interval", "")
    return (layer + 1) % every == 0 and first <= layer and (last < 0 or layer <= last)
