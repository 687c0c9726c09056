"""LLaMA 1 to 3, SmolLM2, Mistral, and dense Qwen 2 and 3: grouped-query attention and a gated MLP in every layer."""

from __future__ import annotations

from ktcore.graph.architectures.mixtral import build_mixtral
from ktcore.graph.attention import gqa_node
from ktcore.graph.decoder import decoder_graph, rms_eps
from ktcore.graph.maker import NodeMaker
from ktcore.graph.names import ATTENTION, MLP
from ktcore.graph.node import Graph, Node
from ktcore.graph.settings import Settings
from ktcore.ops.rope import Pairing


def build_llama(settings: Settings) -> Graph:
    """`llama` of both kinds of checkpoint, `mistral` of hub folders; `llama` GGUF files with experts are Mixtral's."""
    if settings.integer("", "expert_count", 0, least=0) > 0:
        return build_mixtral(settings)
    # converters to GGUF permute the rows of q and k, so the same model pairs them differently there
    return build_dense(settings, "interleaved" if settings.gguf else "half")


def build_qwen2(settings: Settings) -> Graph:
    """`qwen2`: biases on q, k and v."""
    return build_dense(settings, "half")


def build_qwen3(settings: Settings) -> Graph:
    """`qwen3`: RMSNorm over the heads of q and k."""
    return build_dense(settings, "half", qk_norm=True)


def build_phi3(settings: Settings) -> Graph:
    """`phi3` of hub folders: q, k and v in one tensor, gate and up in another."""
    return build_dense(settings, "half")


def build_dense(settings: Settings, pairing: Pairing, *, qk_norm: bool = False) -> Graph:
    """A dense decoder with grouped-query attention."""
    make = NodeMaker(settings, {**ATTENTION, **MLP})
    hidden = settings.integer("hidden_size", "embedding_length")

    def attention(name: str, layer: int) -> Node:
        return gqa_node(make, name, layer, pairing, qk_norm=qk_norm)

    def ffn(name: str, layer: int) -> Node:
        width = settings.integer("intermediate_size", "feed_forward_length", layer=layer)
        return make.mlp(name, hidden, width, eps=rms_eps(make))

    return decoder_graph(make, "llama", attention, ffn)
