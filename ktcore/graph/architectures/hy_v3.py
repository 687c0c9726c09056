"""Hy3: attention with norms over q and k heads, a dense layer first, then sigmoid-routed experts and a shared one."""

from __future__ import annotations

from ktcore.graph.attention import gqa_node
from ktcore.graph.decoder import decoder_graph, rms_eps
from ktcore.graph.defaults import Defaults
from ktcore.graph.experts import Routing, moe_node
from ktcore.graph.gating import SIGMOID, is_dense, is_sigmoid
from ktcore.graph.maker import NodeMaker
from ktcore.graph.names import ATTENTION, MOE, NameTable
from ktcore.graph.node import Graph, Node
from ktcore.graph.settings import Settings

NAMES: NameTable = {
    "ffn.router": ("mlp.router.gate", "ffn_gate_inp"),
    "ffn.router.bias": ("mlp.expert_bias", "exp_probs_b"),  # alone of all families without a suffix
    "further.norm": ("final_layernorm", "nextn.shared_head_norm"),
    "ffn.shared.gate": ("mlp.shared_mlp.gate_proj", "ffn_gate_shexp"),
    "ffn.shared.up": ("mlp.shared_mlp.up_proj", "ffn_up_shexp"),
    "ffn.shared.down": ("mlp.shared_mlp.down_proj", "ffn_down_shexp"),
}

DEFAULTS = Defaults(
    hub={
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
        "rope_theta": 11158840.0,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "attention_bias": False,
        "mlp_bias": False,
        "mlp_layer_types": None,
        "num_experts_per_tok": 8,
        "num_shared_experts": 1,
        "router_scaling_factor": 2.826,
    },
    null={"mlp_layer_types": []},
    gguf={"expert_gating_func": SIGMOID, "expert_weights_norm": False},
    biases={**dict.fromkeys("qkvo", "attention_bias"), **dict.fromkeys(("gate", "up", "down"), "mlp_bias")},
    only={"route_norm": (True,), "qk_norm": (True,), "first_k_dense_replace": (1,), "moe_router_use_sigmoid": (True,)},
)
"""Of `HYV3Config` in transformers, which does not read the keys of the last line, and of `hy_v3` in llama.cpp."""


def build_hy_v3(settings: Settings) -> Graph:
    """`hy_v3` of hub folders and of GGUF files."""
    settings = settings.under(DEFAULTS)
    make = NodeMaker(settings, {**ATTENTION, **MOE, **NAMES})
    hidden = settings.integer("hidden_size", "embedding_length")
    sigmoid = not settings.gguf or is_sigmoid(settings)
    routing = Routing(
        experts=settings.integer("num_experts|num_local_experts", "expert_count"),
        top_k=settings.integer("num_experts_per_tok", "expert_used_count"),
        score="sigmoid" if sigmoid else "softmax",
        choice_bias=True,
        renormalise=settings.flag("", "expert_weights_norm", without=True),
        renorm_eps=1e-20,
        scale=settings.number("router_scaling_factor", "expert_weights_scale") or 1.0,
    )

    def attention(name: str, layer: int) -> Node:
        return gqa_node(make, name, layer, "half", qk_norm=True)

    def ffn(name: str, layer: int) -> Node:
        if is_dense(make, name, layer):
            width = settings.integer("intermediate_size", "feed_forward_length", layer=layer)
            return make.mlp(name, hidden, width, eps=rms_eps(make))
        width = settings.integer("moe_intermediate_size|expert_hidden_dim", "expert_feed_forward_length", layer=layer)
        shared = settings.integer("num_shared_experts", "", without=1) * width
        shared = settings.integer("", "expert_shared_feed_forward_length", without=shared)
        return moe_node(make, name, hidden, width, rms_eps(make), routing, shared)

    return decoder_graph(make, "gqa_moe", attention, ffn, further=(attention, ffn))
