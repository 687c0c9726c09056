"""DeepSeek-V2 and V3, R1, Kimi-K2, Moonlight: latent attention, leading dense layers, routed and shared experts."""

from __future__ import annotations

from ktcore.graph.architectures.deepseek_mla import mla_node
from ktcore.graph.architectures.deepseek_moe import deepseek_ffn
from ktcore.graph.decoder import decoder_graph
from ktcore.graph.maker import NodeMaker
from ktcore.graph.names import MLA, MOE
from ktcore.graph.node import Graph
from ktcore.graph.settings import Settings


def build_deepseek(settings: Settings) -> Graph:
    """`deepseek_v3`, `kimi_k2` and `deepseek_v2` of hub folders; `deepseek2` of GGUF files, which serves them all."""
    make = NodeMaker(settings, {**MLA, **MOE})
    return decoder_graph(make, "deepseek_v3", lambda name, _: mla_node(make, name), deepseek_ffn(make))
