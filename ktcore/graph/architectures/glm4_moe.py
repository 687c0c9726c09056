"""GLM-4.5, 4.5-Air and 4.6: attention with half-rotated heads, DeepSeek-V3's experts without groups."""

from __future__ import annotations

from ktcore.graph.architectures.deepseek_moe import DEEPSEEK_GGUF, deepseek_ffn
from ktcore.graph.attention import gqa_node
from ktcore.graph.decoder import decoder_graph
from ktcore.graph.defaults import DERIVED, Defaults
from ktcore.graph.gating import SIGMOID
from ktcore.graph.maker import NodeMaker
from ktcore.graph.names import ATTENTION, MOE
from ktcore.graph.node import Graph, Node
from ktcore.graph.settings import Settings

# in GGUF this is the norm before the experts, although its name is that of GLM-4's norm after the attention
NORM = {"ffn.norm": ("post_attention_layernorm", "post_attention_norm")}

DEFAULTS = Defaults(
    hub={
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
        "rope_theta": 10000.0,
        "partial_rotary_factor": 0.5,
        "num_key_value_heads": 8,
        "head_dim": DERIVED,
        "attention_bias": False,
        "use_qk_norm": False,
        "first_k_dense_replace": 1,
        "moe_layer_freq": 1,
        "n_shared_experts": 1,
        "num_experts_per_tok": 8,
        "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
        "n_group": 1,
        "topk_group": 1,
        "norm_topk_prob": True,
        "routed_scaling_factor": 1.0,
    },
    gguf={**DEEPSEEK_GGUF, "expert_gating_func": SIGMOID},
    biases=dict.fromkeys("qkv", "attention_bias"),
)
"""Of `Glm4MoeConfig`; `scoring_func`, `topk_method` and `moe_layer_freq` are what its code does."""


def build_glm4_moe(settings: Settings) -> Graph:
    """`glm4_moe` of hub folders, `glm4moe` of GGUF files."""
    settings = settings.under(DEFAULTS)
    make = NodeMaker(settings, {**ATTENTION, **MOE, **NORM})
    # GGUF has no key for it
    qk_norm = settings.flag("use_qk_norm", "", without=make.has("layers.0.attn.q_norm"))

    def attention(name: str, layer: int) -> Node:
        return gqa_node(make, name, layer, "half", qk_norm=qk_norm, partial=True)

    ffn = deepseek_ffn(make)
    return decoder_graph(make, "gqa_moe", attention, ffn, further=(attention, ffn))
