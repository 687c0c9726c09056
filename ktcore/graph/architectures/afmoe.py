"""AFMoE (Trinity): gated attention with rotation in windows alone, norms around each branch, sigmoid-routed experts."""

from __future__ import annotations

from ktcore.graph.attention import HEADS, KV_HEADS, Heads, attention_node, check_heads
from ktcore.graph.decoder import decoder_graph, rms_eps
from ktcore.graph.defaults import DERIVED, Defaults
from ktcore.graph.experts import Routing, moe_node
from ktcore.graph.gating import SIGMOID, is_sigmoid
from ktcore.graph.layerwise import FULL, SLIDING, kind_of
from ktcore.graph.maker import NodeMaker
from ktcore.graph.names import ATTENTION, MOE, NameTable
from ktcore.graph.node import Graph, Node
from ktcore.graph.rotary import rope_node
from ktcore.graph.settings import Settings

NAMES: NameTable = {
    "attn.gate": ("self_attn.gate_proj", "attn_gate"),
    "attn.post_norm": ("post_attention_layernorm", "post_attention_norm"),
    "ffn.norm": ("pre_mlp_layernorm", "ffn_norm"),
    "ffn.post_norm": ("post_mlp_layernorm", "post_ffw_norm"),
    "ffn.router": ("mlp.router.gate", "ffn_gate_inp"),
    "ffn.router.bias": ("mlp.expert_bias", "exp_probs_b.bias"),
}
EVERY = 4

DEFAULTS = Defaults(
    hub={
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
        "rope_theta": 10000.0,
        "num_attention_heads": 16,
        "num_key_value_heads": None,
        "head_dim": 128,
        "attention_bias": False,
        "num_dense_layers": 1,
        "num_experts": 64,
        "num_experts_per_tok": 6,
        "num_shared_experts": 2,
        "moe_intermediate_size": 1408,
        "route_scale": 1.0,
        "global_attn_every_n_layers": EVERY,
        "sliding_window": 1024,
        "layer_types": None,
        "mup_enabled": False,
    },
    null={"num_key_value_heads": DERIVED, "layer_types": []},
    gguf={
        "leading_dense_block_count": 0,
        "expert_gating_func": SIGMOID,
        "expert_weights_norm": False,
        "attention.sliding_window": 0,
    },
    biases=dict.fromkeys("qkvo", "attention_bias"),
    only={"score_func": ("sigmoid",), "route_norm": (True,), "n_group": (1,), "topk_group": (1,)},
)
"""Of `AfmoeConfig` in transformers, which does not read the keys of `only`, and of `afmoe` in llama.cpp."""


def build_afmoe(settings: Settings) -> Graph:
    """`afmoe` of hub folders and of GGUF files."""
    settings = settings.under(DEFAULTS)
    make = NodeMaker(settings, {**ATTENTION, **MOE, **NAMES})
    hidden, eps = settings.integer("hidden_size", "embedding_length"), rms_eps(make)
    sigmoid = not settings.gguf or is_sigmoid(settings)
    routing = Routing(
        experts=settings.integer("num_experts|num_local_experts", "expert_count"),
        top_k=settings.integer("num_experts_per_tok", "expert_used_count"),
        score="sigmoid" if sigmoid else "softmax",
        choice_bias=True,
        renormalise=settings.flag("", "expert_weights_norm", without=True),
        renorm_eps=1e-20,
        scale=settings.number("route_scale", "expert_weights_scale") or 1.0,
    )

    def attention(name: str, layer: int) -> Node:
        query = settings.integer(*HEADS, layer=layer)
        keys = settings.integer(*KV_HEADS, derived=query, layer=layer)
        check_heads(settings, query, keys)
        dim = settings.integer("head_dim", "attention.key_length", derived=hidden // query)
        window = (
            settings.integer("sliding_window", "attention.sliding_window", least=0) if _slides(settings, layer) else 0
        )
        rotates = (layer + 1) % EVERY != 0 if settings.gguf else bool(window)
        return attention_node(
            make,
            name,
            Heads(query, keys, dim),
            rope_node(make, f"{name}.rope", dim, "half") if rotates else None,
            norms="head",
            post_norm=True,
            window=window,
            gate="tensor",
        )

    def ffn(name: str, layer: int) -> Node:
        if layer < settings.integer("num_dense_layers", "leading_dense_block_count", least=0):
            dense = settings.integer("intermediate_size", "feed_forward_length", layer=layer)
            return make.mlp(name, hidden, dense, eps=eps, post_norm=True)
        width = settings.integer("moe_intermediate_size", "expert_feed_forward_length", layer=layer)
        shared = settings.integer("num_shared_experts", "expert_shared_count", least=0) * width
        return moe_node(make, name, hidden, width, eps, routing, shared, post_norm=True)

    scaled = settings.flag("mup_enabled", "", without=True)  # of llama.cpp always
    return decoder_graph(make, "gqa_moe", attention, ffn, embed_scale=hidden**0.5 if scaled else 1.0)


def _slides(s: Settings, layer: int) -> bool:
    every = s.integer("global_attn_every_n_layers", "", without=EVERY)
    return kind_of(s, layer, SLIDING if (layer + 1) % every else FULL) == SLIDING
