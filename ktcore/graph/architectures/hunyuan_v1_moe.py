"""Hunyuan-A13B: norms over q and k heads after their rotation, softmax-routed experts and an ungated shared one."""

from __future__ import annotations

from ktcore.graph.attention import gqa_node
from ktcore.graph.decoder import decoder_graph, rms_eps
from ktcore.graph.defaults import DERIVED, Defaults
from ktcore.graph.experts import Routing, moe_node
from ktcore.graph.maker import NodeMaker
from ktcore.graph.names import ATTENTION, MOE, NameTable
from ktcore.graph.node import Graph, Node
from ktcore.graph.settings import Settings

NAMES: NameTable = {
    "attn.q_norm": ("self_attn.query_layernorm", "attn_q_norm"),
    "attn.k_norm": ("self_attn.key_layernorm", "attn_k_norm"),
    "ffn.router": ("mlp.gate.wg", "ffn_gate_inp"),
    "ffn.shared.gate": ("mlp.shared_mlp.gate_proj", "ffn_gate_shexp"),
    "ffn.shared.up": ("mlp.shared_mlp.up_proj", "ffn_up_shexp"),
    "ffn.shared.down": ("mlp.shared_mlp.down_proj", "ffn_down_shexp"),
}

DEFAULTS = Defaults(
    hub={
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
        "rope_theta": 10000.0,
        "num_key_value_heads": None,
        "head_dim": DERIVED,
        "attention_bias": False,
        "moe_topk": 1,
        "num_experts": 1,
    },
    null={"num_key_value_heads": DERIVED, "head_dim": DERIVED},
    gguf={"expert_shared_feed_forward_length": DERIVED},
    biases=dict.fromkeys("qkvo", "attention_bias"),
    only={"use_qk_norm": (True,), "use_cla": (False,), "use_mixed_mlp_moe": (True,), "norm_type": ("rms",)},
)
"""Of `HunYuanMoEV1Config`, which does not read the keys of `only`, and of `hunyuan-moe` in llama.cpp."""


def build_hunyuan_v1_moe(settings: Settings) -> Graph:
    """`hunyuan_v1_moe` of hub folders, `hunyuan-moe` of GGUF files."""
    settings = settings.under(DEFAULTS)
    make = NodeMaker(settings, {**ATTENTION, **MOE, **NAMES})
    hidden = settings.integer("hidden_size", "embedding_length")
    experts = settings.integer("num_experts|num_local_experts", "expert_count")

    def attention(name: str, layer: int) -> Node:
        return gqa_node(make, name, layer, "half", qk_norm=True, norm_after_rope=True, alpha=True)

    def ffn(name: str, layer: int) -> Node:
        top_k = settings.integer("moe_topk|num_experts_per_tok", "expert_used_count", layer=layer)
        width = settings.integer("intermediate_size", "feed_forward_length", layer=layer)
        for key, usual in (("moe_intermediate_size", width), ("num_shared_expert", 1)):
            listed = settings.given(key)
            if any(value != usual for value in (listed if isinstance(listed, list) else [listed]) if value is not None):
                raise settings.error(f"{key} is {listed!r}, which '{settings.architecture}' is not known to do here")
        shared = settings.integer("", "expert_shared_feed_forward_length", without=width, derived=width)
        return moe_node(make, name, hidden, width, rms_eps(make), Routing(experts, top_k, renormalise=True), shared)

    return decoder_graph(make, "gqa_moe", attention, ffn)
