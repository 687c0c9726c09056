"""MiniMax-M2 to 2.7: attention with a norm over all heads of q and one over those of k, sigmoid-routed experts."""

from __future__ import annotations

from ktcore.graph.attention import gqa_node
from ktcore.graph.decoder import decoder_graph, rms_eps
from ktcore.graph.defaults import Defaults
from ktcore.graph.experts import Routing, moe_node
from ktcore.graph.gating import SIGMOID, is_sigmoid
from ktcore.graph.maker import NodeMaker
from ktcore.graph.names import ATTENTION, MOE, NameTable
from ktcore.graph.node import Graph, Node
from ktcore.graph.settings import Settings

HUB: NameTable = {
    "ffn.router": ("block_sparse_moe.gate", "ffn_gate_inp"),
    "ffn.router.bias": ("block_sparse_moe.e_score_correction_bias", "exp_probs_b.bias"),
    "ffn.experts.gate": ("block_sparse_moe.experts.{}.w1", "ffn_gate_exps"),
    "ffn.experts.up": ("block_sparse_moe.experts.{}.w3", "ffn_up_exps"),
    "ffn.experts.down": ("block_sparse_moe.experts.{}.w2", "ffn_down_exps"),
}
FUSED: NameTable = {"ffn.router.bias": ("mlp.e_score_correction_bias", "exp_probs_b.bias")}
"""What transformers has in memory."""

DEFAULTS = Defaults(
    hub={
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
        "rope_theta": 5e6,
        "partial_rotary_factor": 1.0,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "num_experts_per_tok": 8,
    },
    gguf={"expert_gating_func": SIGMOID},
    # keys of the hub's files that the class does not read: what it does
    only={
        "scoring_func": ("sigmoid",),
        "use_routing_bias": (True,),
        "use_qk_norm": (True,),
        "qk_norm_type": ("per_layer",),
        "shared_intermediate_size": (0,),
        "attention_bias": (False,),
    },
)
"""Of `MiniMaxM2Config` in transformers, and of `minimax-m2` in llama.cpp."""


def build_minimax_m2(settings: Settings) -> Graph:
    """`minimax_m2` of hub folders, `minimax-m2` of GGUF files."""
    settings = _with_rotary_part(settings.under(DEFAULTS))
    fused = "model.layers.0.mlp.gate.weight" in settings.checkpoint.tensors
    make = NodeMaker(settings, {**ATTENTION, **MOE, **(FUSED if fused else HUB)})
    hidden = settings.integer("hidden_size", "embedding_length")
    if settings.gguf and not is_sigmoid(settings):
        raise settings.error("expert_gating_func is softmax, which architecture 'minimax-m2' is not known to have")
    kinds = settings.given("attn_type_list")
    if kinds is not None and (not isinstance(kinds, list) or any(kind != 1 for kind in kinds)):
        raise settings.error(f"attn_type_list is {kinds!r:.80}, only full attention (1) is known here")
    routing = Routing(
        experts=settings.integer("num_local_experts|num_experts", "expert_count"),
        top_k=settings.integer("num_experts_per_tok", "expert_used_count"),
        score="sigmoid",
        choice_bias=True,
        renormalise=True,
    )

    def attention(name: str, layer: int) -> Node:
        return gqa_node(make, name, layer, "half", whole_norm=True, partial=True)

    def ffn(name: str, layer: int) -> Node:
        width = settings.integer("intermediate_size", "expert_feed_forward_length", layer=layer)
        return moe_node(make, name, hidden, width, rms_eps(make), routing)

    return decoder_graph(make, "gqa_moe", attention, ffn)


def _with_rotary_part(s: Settings) -> Settings:
    """Released files give the rotated part of a head by its width."""
    if s.gguf or s.given("rotary_dim") is None or "partial_rotary_factor" in s.config:
        return s
    part = s.integer("rotary_dim", "") / s.integer("head_dim", "")
    return s.within({**s.config, "partial_rotary_factor": part})
