"""Solar-Open: plain grouped-query attention, DeepSeek-V3's experts in every layer."""

from __future__ import annotations

from ktcore.graph.architectures.deepseek_moe import deepseek_ffn
from ktcore.graph.attention import gqa_node
from ktcore.graph.decoder import decoder_graph
from ktcore.graph.defaults import Defaults
from ktcore.graph.maker import NodeMaker
from ktcore.graph.names import ATTENTION, MOE
from ktcore.graph.node import Graph, Node
from ktcore.graph.settings import Settings

DEFAULTS = Defaults(
    hub={
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
        "rope_theta": 1e6,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "attention_bias": False,
        "first_k_dense_replace": 0,
        "moe_layer_freq": 1,
        "n_shared_experts": 1,
        "num_experts_per_tok": 8,
        "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
        "n_group": 1,
        "topk_group": 1,
        "norm_topk_prob": True,
        "routed_scaling_factor": 1.0,
    },
    biases=dict.fromkeys("qkv", "attention_bias"),
    # the class has none of these, whatever the hub's files say
    only={"first_k_dense_replace": (0,), "use_qk_norm": (False,)},
)
"""Of `SolarOpenConfig`; the keys of DeepSeek's that it lacks are what its code does."""


def build_solar_open(settings: Settings) -> Graph:
    """`solar_open` of hub folders."""
    make = NodeMaker(settings.under(DEFAULTS), {**ATTENTION, **MOE})

    def attention(name: str, layer: int) -> Node:
        return gqa_node(make, name, layer, "half")

    return decoder_graph(make, "gqa_moe", attention, deepseek_ffn(make))
