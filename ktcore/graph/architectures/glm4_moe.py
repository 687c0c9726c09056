"""GLM-4.5, 4.5-Air and 4.6: attention with half-rotated heads, DeepSeek-V3's experts without groups."""

from __future__ import annotations

from ktcore.graph.architectures.deepseek_moe import deepseek_ffn
from ktcore.graph.attention import gqa_node
from ktcore.graph.decoder import decoder_graph
from ktcore.graph.maker import NodeMaker
from ktcore.graph.names import ATTENTION, MOE
from ktcore.graph.node import Graph, Node
from ktcore.graph.settings import Settings

# in GGUF this is the norm before the experts, although its name is that of GLM-4's norm after the attention
NORM = {"ffn.norm": ("post_attention_layernorm", "post_attention_norm")}
ROTATED = 0.5  # of a head, where the configuration does not say


def build_glm4_moe(settings: Settings) -> Graph:
    """`glm4_moe` of hub folders, `glm4moe` of GGUF files."""
    make = NodeMaker(settings, {**ATTENTION, **MOE, **NORM})
    # GGUF has no key for it
    qk_norm = bool(settings.get("use_qk_norm", "", make.has("layers.0.attn.q_norm")))

    def attention(name: str, layer: int) -> Node:
        return gqa_node(make, name, layer, "half", qk_norm=qk_norm, partial=ROTATED, window=0)

    return decoder_graph(make, "gqa_moe", attention, deepseek_ffn(make))
