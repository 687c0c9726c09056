"""Dense GLM-4: interleaved rotary embedding over half of each head, fused gate and up, norms around each branch."""

from __future__ import annotations

from ktcore.graph.attention import gqa_node
from ktcore.graph.decoder import decoder_graph, rms_eps
from ktcore.graph.maker import NodeMaker
from ktcore.graph.names import ATTENTION, MLP, NameTable
from ktcore.graph.node import Graph, Node
from ktcore.graph.settings import Settings

POST_NORMS: NameTable = {
    "attn.post_norm": ("post_self_attn_layernorm", "post_attention_norm"),
    "ffn.post_norm": ("post_mlp_layernorm", "post_ffw_norm"),
}
ROTATED = 0.5  # of a head, where the configuration does not say


def build_glm4(settings: Settings) -> Graph:
    """`glm4` of both kinds of checkpoint: GLM-4-0414."""
    make = NodeMaker(settings, {**ATTENTION, **MLP, **POST_NORMS})
    hidden = settings.integer("hidden_size", "embedding_length")

    def attention(name: str, layer: int) -> Node:
        return gqa_node(make, name, layer, "interleaved", post_norm=True, partial=ROTATED, window=0)

    def ffn(name: str, layer: int) -> Node:
        width = settings.integer("intermediate_size", "feed_forward_length", layer=layer)
        return make.mlp(name, hidden, width, eps=rms_eps(make), post_norm=True)

    return decoder_graph(make, "dense", attention, ffn)
