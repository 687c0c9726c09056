"""Qwen3.5, 3.6 and 3.8, dense and MoE: Qwen3-Next's layers with projections of their own names and plain head order."""

from __future__ import annotations

from ktcore.graph.architectures.qwen3_next import NAMES, full_attention, is_delta_net
from ktcore.graph.decoder import Branch, decoder_graph, rms_eps
from ktcore.graph.defaults import Defaults
from ktcore.graph.delta_net import SPLIT_DELTA_NET, delta_net_node
from ktcore.graph.experts import Routing, moe_node
from ktcore.graph.maker import NodeMaker
from ktcore.graph.names import ATTENTION, MOE, SHARED_EXPERT
from ktcore.graph.node import Graph, Node
from ktcore.graph.settings import Settings

_COMMON = {
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "rope_theta": 10000.0,
    "partial_rotary_factor": 0.25,
    "head_dim": 256,
    "attention_bias": False,
    "layer_types": None,
    "full_attention_interval": 4,
    "linear_conv_kernel_dim": 4,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "linear_num_key_heads": 16,
    "linear_num_value_heads": 32,
}
_BIASES = dict.fromkeys("qkvo", "attention_bias")
# what the class does whatever these say, and hub files hold
_ONLY = {"attn_output_gate": (True,), "output_gate_type": ("swish", "silu")}
_LEFT_OUT = {"mtp.": "the layer that predicts a further token"}

DENSE = Defaults(
    hub={**_COMMON, "num_key_value_heads": 4},
    null={"layer_types": []},
    biases=_BIASES,
    only=_ONLY,
    left_out=_LEFT_OUT,
)
"""Of `Qwen3_5TextConfig` in transformers, and of `qwen35` in llama.cpp."""

SPARSE = Defaults(
    hub={
        **_COMMON,
        "num_key_value_heads": 2,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": 512,
        "shared_expert_intermediate_size": 512,
    },
    null={"layer_types": []},
    biases=_BIASES,
    only={**_ONLY, "norm_topk_prob": (True,)},
    left_out=_LEFT_OUT,
)
"""Of `Qwen3_5MoeTextConfig` in transformers, and of `qwen35moe` in llama.cpp."""


def build_qwen3_5(settings: Settings) -> Graph:
    """`qwen3_5_text` of hub folders, whose norms are zero-centred; `qwen35` of GGUF files, whose are not."""
    make = _maker(settings.under(DENSE))
    hidden, eps = make.settings.integer("hidden_size", "embedding_length"), rms_eps(make)

    def ffn(name: str, layer: int) -> Node:
        width = make.settings.integer("intermediate_size", "feed_forward_length", layer=layer)
        return make.mlp(name, hidden, width, eps=eps)

    full = full_attention(make)
    return decoder_graph(make, "qwen3_5", _attention(make, full), ffn, further=(full, ffn))


def build_qwen3_5_moe(settings: Settings) -> Graph:
    """`qwen3_5_moe_text` of hub folders, `qwen35moe` of GGUF files."""
    make = _maker(settings.under(SPARSE))
    s = make.settings
    hidden, eps = s.integer("hidden_size", "embedding_length"), rms_eps(make)
    routing = Routing(
        experts=s.integer("num_experts|num_local_experts", "expert_count"),
        top_k=s.integer("num_experts_per_tok", "expert_used_count"),
        renormalise=True,
        scale=s.number("", "expert_weights_scale", without=1.0) or 1.0,
    )

    def ffn(name: str, layer: int) -> Node:
        width = s.integer("moe_intermediate_size", "expert_feed_forward_length", layer=layer)
        shared = s.integer("shared_expert_intermediate_size", "expert_shared_feed_forward_length")
        return moe_node(make, name, hidden, width, eps, routing, shared, shared_gate=True)

    full = full_attention(make)
    return decoder_graph(make, "qwen3_next", _attention(make, full), ffn, further=(full, ffn))


def _maker(settings: Settings) -> NodeMaker:
    names = {**ATTENTION, **MOE, **SHARED_EXPERT, **SPLIT_DELTA_NET, **NAMES}
    return NodeMaker(settings, names, norm_offset=0.0 if settings.gguf else 1.0)


def _attention(make: NodeMaker, full: Branch) -> Branch:
    """The three sections of the rotary embedding have equal positions in text: it is the plain one."""

    def attention(name: str, layer: int) -> Node:
        if is_delta_net(make, name, layer):
            # converters put value heads in another order, so that llama.cpp can repeat key heads as a whole
            return delta_net_node(make, name, tiled=make.settings.gguf)
        return full(name, layer)

    return attention
