"""Qwen3-Next: three layers of gated delta net to one of gated attention, experts beside a gated shared one."""

from __future__ import annotations

from ktcore.graph.architectures.qwen3_moe import has_experts
from ktcore.graph.attention import gqa_node
from ktcore.graph.decoder import Branch, decoder_graph, rms_eps
from ktcore.graph.defaults import DERIVED, Defaults
from ktcore.graph.delta_net import DELTA_NET, delta_net_node
from ktcore.graph.experts import Routing, moe_node
from ktcore.graph.maker import NodeMaker
from ktcore.graph.names import ATTENTION, MOE, SHARED_EXPERT, ApartLayers, NameTable
from ktcore.graph.node import Graph, Node
from ktcore.graph.settings import Settings

# GGUF's name of the norm before the FFN sounds like one after attention
NAMES: NameTable = {"ffn.norm": ("post_attention_layernorm", "post_attention_norm")}

FURTHER = {
    "further.embed_norm": "mtp.pre_fc_norm_embedding",
    "further.hidden_norm": "mtp.pre_fc_norm_hidden",
    "further.project": "mtp.fc",
    "further.norm": "mtp.norm",
}
"""Names of hub folders outside of the layer that predicts further tokens."""

DEFAULTS = Defaults(
    hub={
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
        "rope_theta": 10000.0,
        "partial_rotary_factor": 0.25,
        "num_key_value_heads": 2,
        "head_dim": 256,
        "attention_bias": False,
        "layer_types": None,
        "full_attention_interval": 4,
        "linear_conv_kernel_dim": 4,
        "linear_key_head_dim": 128,
        "linear_value_head_dim": 128,
        "linear_num_key_heads": 16,
        "linear_num_value_heads": 32,
        "mlp_only_layers": None,
        "decoder_sparse_step": 1,
        "num_experts_per_tok": 10,
        "norm_topk_prob": True,
        "moe_intermediate_size": 512,
        "shared_expert_intermediate_size": 512,
    },
    null={"layer_types": [], "mlp_only_layers": []},
    gguf={
        "expert_weights_norm": True,
        "expert_feed_forward_length": DERIVED,
        "expert_shared_feed_forward_length": DERIVED,
    },
    biases=dict.fromkeys("qkvo", "attention_bias"),
    left_out={"mtp.": "the layer that predicts a further token"},
)
"""Of `Qwen3NextConfig` in transformers, and of `qwen3next` in llama.cpp."""


def build_qwen3_next(settings: Settings) -> Graph:
    """`qwen3_next` of hub folders, whose norms are zero-centred; `qwen3next` of GGUF files, whose are not."""
    settings = settings.under(DEFAULTS)
    make = NodeMaker(
        settings,
        {**ATTENTION, **MOE, **SHARED_EXPERT, **DELTA_NET, **NAMES},
        norm_offset=0.0 if settings.gguf else 1.0,
    )
    hidden = settings.integer("hidden_size", "embedding_length")
    routing = Routing(
        experts=settings.integer("num_experts|num_local_experts", "expert_count"),
        top_k=settings.integer("num_experts_per_tok", "expert_used_count"),
        renormalise=settings.flag("norm_topk_prob", "expert_weights_norm"),
        scale=settings.number("", "expert_weights_scale", without=1.0) or 1.0,
    )

    full = full_attention(make)

    def attention(name: str, layer: int) -> Node:
        return delta_net_node(make, name) if is_delta_net(make, name, layer) else full(name, layer)

    def ffn(name: str, layer: int) -> Node:
        dense = settings.integer("intermediate_size", "feed_forward_length", layer=layer)
        if not has_experts(make, name, layer):
            return make.mlp(name, hidden, dense, eps=rms_eps(make))
        width = settings.integer("moe_intermediate_size", "expert_feed_forward_length", derived=dense // routing.top_k)
        shared = settings.integer("shared_expert_intermediate_size", "expert_shared_feed_forward_length", derived=dense)
        return moe_node(make, name, hidden, width, rms_eps(make), routing, shared, shared_gate=True)

    return decoder_graph(make, "qwen3_next", attention, ffn, further=(full, ffn))


def full_attention(make: NodeMaker) -> Branch:
    """The branch of layers that are no delta net, such as the one that predicts further tokens."""
    if not make.settings.gguf:
        make.names.apart = ApartLayers(make.settings.layers(), "mtp.layers.{}.", FURTHER)
    return lambda name, layer: gqa_node(make, name, layer, "half", qk_norm=True, partial=True, gate=True)


def is_delta_net(make: NodeMaker, name: str, layer: int) -> bool:
    """Whether a layer is a delta net; GGUF's tensors tell, config.json lists the layers or names an interval."""
    if make.settings.gguf:
        return make.has(f"{name}.conv")
    kinds = make.settings.sequence("layer_types")
    if not kinds:
        return (layer + 1) % make.settings.integer("full_attention_interval", "") != 0
    kind = kinds[layer] if layer < len(kinds) else None
    if kind not in ("linear_attention", "full_attention"):
        raise make.settings.error(
            f"layer_types says {kind!r} of layer {layer}", "known: linear_attention, full_attention"
        )
    return bool(kind == "linear_attention")
