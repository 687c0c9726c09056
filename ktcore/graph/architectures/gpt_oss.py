"""gpt-oss: attention with sinks, every other layer in a window; experts with biases and a clamped activation."""

from __future__ import annotations

from ktcore.graph.attention import gqa_node
from ktcore.graph.decoder import decoder_graph, rms_eps
from ktcore.graph.defaults import Defaults
from ktcore.graph.experts import Experts, Routing, moe_node
from ktcore.graph.maker import NodeMaker
from ktcore.graph.names import ATTENTION, MOE, NameTable
from ktcore.graph.node import Graph, Node
from ktcore.graph.settings import Settings
from ktcore.graph.windows import marked_sliding
from ktcore.ops.mlp import ClampedGLU

NAMES: NameTable = {
    "attn.sinks": ("self_attn.sinks", "attn_sinks"),
    "ffn.norm": ("post_attention_layernorm", "post_attention_norm"),
    "ffn.router": ("mlp.router", "ffn_gate_inp"),
}

DEFAULTS = Defaults(
    hub={
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
        "rope_theta": 150000.0,
        # present ones, of whatever form, take its place as a whole
        "rope_parameters": {
            "rope_type": "yarn",
            "factor": 32.0,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "truncate": False,
            "original_max_position_embeddings": 4096,
        },
        "num_key_value_heads": 8,
        "head_dim": 64,
        "attention_bias": True,
        "sliding_window": 128,
        "layer_types": None,
        "num_experts_per_tok": 4,
        "swiglu_alpha": 1.702,
        "swiglu_limit": 7.0,
    },
    null={"layer_types": []},
    biases=dict.fromkeys("qkvo", "attention_bias"),
)
"""Of `GptOssConfig`."""


def build_gpt_oss(settings: Settings) -> Graph:
    """`gpt_oss` of hub folders, `gpt-oss` of GGUF files."""
    settings = settings.under(DEFAULTS)
    make = NodeMaker(settings, {**ATTENTION, **MOE, **NAMES})
    hidden = settings.integer("hidden_size", "embedding_length")
    routing = Routing(
        experts=settings.integer("num_local_experts|num_experts", "expert_count"),
        top_k=settings.integer("num_experts_per_tok", "expert_used_count"),
        logit_bias=True,
        on_logits=True,
    )
    alpha, limit = (DEFAULTS.hub[key] for key in ("swiglu_alpha", "swiglu_limit"))  # GGUF files do not hold them
    clamped = ClampedGLU(
        settings.number("swiglu_alpha", "", without=alpha), settings.number("swiglu_limit", "", without=limit)
    )
    kind = Experts(input_major=True, interleaved=True, bias=True, clamped=clamped)
    width = settings.integer("intermediate_size", "expert_feed_forward_length")

    def attention(name: str, layer: int) -> Node:
        return gqa_node(make, name, layer, "half", window=_window(settings, layer), truncate_yarn=False)

    def ffn(name: str, layer: int) -> Node:
        return moe_node(make, name, hidden, width, rms_eps(make), routing, kind=kind)

    return decoder_graph(make, "gqa_moe", attention, ffn)


def _window(s: Settings, layer: int) -> int:
    """Even layers slide where nothing else is said."""
    window = s.integer("sliding_window", "attention.sliding_window")
    marked = marked_sliding(s, layer)
    slides = layer % 2 == 0 if marked is None else marked
    return window if slides else 0
