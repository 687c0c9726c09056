"""DeepSeek-V2 and V3, R1, Kimi-K2, Moonlight, GLM-4.7-Flash: latent attention, dense layers first, then experts."""

from __future__ import annotations

from ktcore.graph.architectures.deepseek_mla import mla_node
from ktcore.graph.architectures.deepseek_moe import DEEPSEEK_GGUF, deepseek_ffn
from ktcore.graph.decoder import decoder_graph
from ktcore.graph.defaults import DERIVED, Defaults
from ktcore.graph.gating import SOFTMAX
from ktcore.graph.maker import NodeMaker
from ktcore.graph.names import MLA, MOE
from ktcore.graph.node import Graph, Node
from ktcore.graph.settings import Settings
from ktcore.ops.attention import Temperature

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

GLM_LITE = Defaults(
    hub={
        **_COMMON,
        "rms_norm_eps": 1e-5,
        "q_lora_rank": 768,
        "mlp_layer_types": None,
        "n_shared_experts": 1,
        "num_experts_per_tok": 4,
        "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
        "n_group": 1,
        "topk_group": 1,
        "norm_topk_prob": True,
        "routed_scaling_factor": 1.8,
    },
    null={"q_lora_rank": 0, "mlp_layer_types": []},
    biases=_BIASES,
    only={"first_k_dense_replace": (1,)},
)
"""Of `Glm4MoeLiteConfig`; `scoring_func`, `topk_method`, `moe_layer_freq` and `first_k_dense_replace` are what its code
does."""

GGUF = Defaults(
    gguf={
        **DEEPSEEK_GGUF,
        "expert_gating_func": SOFTMAX,
        "attention.q_lora_rank": 0,
        "attention.key_length_mla": DERIVED,
        "attention.value_length_mla": DERIVED,
        "attention.temperature_scale": 0.0,
        "attention.temperature_length": 0,
    }
)
"""Of `deepseek2` in llama.cpp."""


def build_deepseek_v2(settings: Settings) -> Graph:
    """`deepseek_v2` of hub folders."""
    return _build(settings.under(V2))


def build_deepseek_v3(settings: Settings) -> Graph:
    """`deepseek_v3` and `kimi_k2` of hub folders."""
    return _build(settings.under(V3))


def build_glm4_moe_lite(settings: Settings) -> Graph:
    """`glm4_moe_lite` of hub folders."""
    return _build(settings.under(GLM_LITE), listed=True)


def build_deepseek2(settings: Settings) -> Graph:
    """`deepseek2` of GGUF files, which serves them all, and Mistral Large 3, whose queries grow."""
    settings = settings.under(GGUF)
    return _build(settings, gguf_temperature(settings))


def _build(settings: Settings, temperature: Temperature | None = None, *, listed: bool = False) -> Graph:
    make = NodeMaker(settings, {**MLA, **MOE})

    def attention(name: str, layer: int) -> Node:
        return mla_node(make, name, temperature=temperature)

    ffn = deepseek_ffn(make, listed=listed)
    return decoder_graph(make, "deepseek_v3", attention, ffn, further=(attention, ffn))


def gguf_temperature(s: Settings) -> Temperature | None:
    """Of the queries, where a GGUF file has one."""
    scale, span = s.number("", "attention.temperature_scale"), s.integer("", "attention.temperature_length", least=0)
    return Temperature(scale, span, 0.0) if scale and span else None
