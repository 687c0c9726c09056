"""Dense GLM-4: interleaved rotary embedding over half of each head, fused gate and up, norms around each branch."""

from __future__ import annotations

from ktcore.graph.attention import gqa_node
from ktcore.graph.decoder import decoder_graph, rms_eps
from ktcore.graph.defaults import Defaults
from ktcore.graph.maker import NodeMaker
from ktcore.graph.names import ATTENTION, MLP, NameTable
from ktcore.graph.node import Graph, Node
from ktcore.graph.settings import Settings

POST_NORMS: NameTable = {
    "attn.post_norm": ("post_self_attn_layernorm", "post_attention_norm"),
    "ffn.post_norm": ("post_mlp_layernorm", "post_ffw_norm"),
}
DEFAULTS = Defaults(
    hub={
        "hidden_act": "silu",
        "rms_norm_eps": 1.5625e-7,
        "tie_word_embeddings": False,
        "rope_theta": 10000.0,
        "partial_rotary_factor": 0.5,
        "num_key_value_heads": 2,
        "head_dim": 128,
        "attention_bias": True,
    },
    biases=dict.fromkeys("qkv", "attention_bias"),
)
"""Of `Glm4Config`."""


def build_glm4(settings: Settings) -> Graph:
    """`glm4` of both kinds of checkpoint: GLM-4-0414."""
    settings = settings.under(DEFAULTS)
    make = NodeMaker(settings, {**ATTENTION, **MLP, **POST_NORMS})
    hidden = settings.integer("hidden_size", "embedding_length")

    def attention(name: str, layer: int) -> Node:
        return gqa_node(make, name, layer, "interleaved", post_norm=True, partial=True)

    def ffn(name: str, layer: int) -> Node:
        width = settings.integer("intermediate_size", "feed_forward_length", layer=layer)
        return make.mlp(name, hidden, width, eps=rms_eps(make), post_norm=True)

    return decoder_graph(make, "dense", attention, ffn)
