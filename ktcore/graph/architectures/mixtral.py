"""Mixtral: LLaMA's attention, routed experts without a shared one in every layer."""

from __future__ import annotations

from ktcore.graph.attention import gqa_node
from ktcore.graph.decoder import decoder_graph, rms_eps
from ktcore.graph.defaults import DERIVED, Defaults
from ktcore.graph.experts import Routing, moe_node
from ktcore.graph.maker import NodeMaker
from ktcore.graph.names import ATTENTION, MOE, NameTable
from ktcore.graph.node import Graph, Node
from ktcore.graph.settings import Settings
from ktcore.graph.windows import every_window
from ktcore.ops.rope import Pairing

HUB: NameTable = {
    "ffn.router": ("block_sparse_moe.gate", "ffn_gate_inp"),
    "ffn.experts.gate": ("block_sparse_moe.experts.{}.w1", "ffn_gate_exps"),
    "ffn.experts.up": ("block_sparse_moe.experts.{}.w3", "ffn_up_exps"),
    "ffn.experts.down": ("block_sparse_moe.experts.{}.w2", "ffn_down_exps"),
}
OLD_GGUF: NameTable = {
    "ffn.experts.gate": ("", "ffn_gate.{}"),
    "ffn.experts.up": ("", "ffn_up.{}"),
    "ffn.experts.down": ("", "ffn_down.{}"),
}
"""Files from before expert tensors were stacked."""

DEFAULTS = Defaults(
    hub={
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
        "rope_theta": 1e6,
        "num_key_value_heads": 8,
        "head_dim": None,
        "num_experts_per_tok": 2,
        "sliding_window": None,
    },
    null={"head_dim": DERIVED, "sliding_window": 0},
)
"""Of `MixtralConfig`."""


def build_mixtral(settings: Settings) -> Graph:
    """`mixtral` of hub folders; GGUF calls it `llama`, too, and permutes q and k likewise."""
    settings = settings.under(DEFAULTS)
    make = NodeMaker(settings, {**ATTENTION, **MOE, **_names(settings)})
    hidden = settings.integer("hidden_size", "embedding_length")
    routing = Routing(
        experts=settings.integer("num_local_experts|num_experts", "expert_count"),
        top_k=settings.integer("num_experts_per_tok", "expert_used_count"),
        renormalise=True,
    )

    def attention(name: str, layer: int) -> Node:
        pairing: Pairing = "interleaved" if settings.gguf else "half"
        return gqa_node(make, name, layer, pairing, window=every_window(settings))

    def ffn(name: str, layer: int) -> Node:
        width = settings.integer("intermediate_size", "feed_forward_length", layer=layer)
        return moe_node(make, name, hidden, width, rms_eps(make), routing)

    return decoder_graph(make, "gqa_moe", attention, ffn)


def _names(settings: Settings) -> NameTable:
    tensors = settings.checkpoint.tensors
    if settings.gguf:
        return OLD_GGUF if "blk.0.ffn_gate.0.weight" in tensors else {}
    # transformers in memory, and when told to write that form, uses the names that others have on the hub
    return {} if "model.layers.0.mlp.gate.weight" in tensors else HUB
