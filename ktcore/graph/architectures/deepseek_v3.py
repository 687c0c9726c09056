"""DeepSeek-V2 and V3, R1, Kimi-K2, Moonlight: latent attention, leading dense layers, routed and shared experts."""

from __future__ import annotations

from ktcore.graph.architectures.deepseek_mla import mla_node
from ktcore.graph.architectures.deepseek_moe import DEEPSEEK_GGUF, SOFTMAX, deepseek_ffn
from ktcore.graph.decoder import decoder_graph
from ktcore.graph.defaults import DERIVED, Defaults
from ktcore.graph.maker import NodeMaker
from ktcore.graph.names import MLA, MOE
from ktcore.graph.node import Graph
from ktcore.graph.settings import Settings

_COMMON = {
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "rope_theta": 10000.0,
    "rope_interleave": True,
    "q_lora_rank": 1536,
    "moe_layer_freq": 1,
    "attention_bias": False,
}
_BIASES = dict.fromkeys(("q_a", "kv_a", "o"), "attention_bias")

V2 = Defaults(
    hub={
        **_COMMON,
        "first_k_dense_replace": 0,
        "n_shared_experts": 2,
        "scoring_func": "softmax",
        "topk_method": "greedy",
        "n_group": None,
        "topk_group": None,
        "routed_scaling_factor": 1.0,
        "mlp_bias": False,
    },
    null={"q_lora_rank": 0},
    biases={**_BIASES, **dict.fromkeys(("gate", "up", "down"), "mlp_bias")},
)
"""Of `DeepseekV2Config`; keys that it lacks are what its code does."""

V3 = Defaults(
    hub={
        **_COMMON,
        "first_k_dense_replace": 3,
        "n_shared_experts": 1,
        "num_experts_per_tok": 8,
        "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
        "n_group": 8,
        "topk_group": 4,
        "norm_topk_prob": True,
        "routed_scaling_factor": 2.5,
    },
    null={"q_lora_rank": 0, "norm_topk_prob": False, "rope_interleave": False},
    biases=_BIASES,
)
"""Of `DeepseekV3Config`, which transformers reads Kimi-K2's configurations with, too."""

GGUF = Defaults(
    gguf={
        **DEEPSEEK_GGUF,
        "expert_gating_func": SOFTMAX,
        "attention.q_lora_rank": 0,
        "attention.key_length_mla": DERIVED,
        "attention.value_length_mla": DERIVED,
    }
)
"""Of `deepseek2` in llama.cpp."""


def build_deepseek_v2(settings: Settings) -> Graph:
    """`deepseek_v2` of hub folders."""
    return _build(settings.under(V2))


def build_deepseek_v3(settings: Settings) -> Graph:
    """`deepseek_v3` and `kimi_k2` of hub folders."""
    return _build(settings.under(V3))


def build_deepseek2(settings: Settings) -> Graph:
    """`deepseek2` of GGUF files, which serves them all."""
    return _build(settings.under(GGUF))


def _build(settings: Settings) -> Graph:
    make = NodeMaker(settings, {**MLA, **MOE})
    return decoder_graph(make, "deepseek_v3", lambda name, _: mla_node(make, name), deepseek_ffn(make))
