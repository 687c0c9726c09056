"""dots.llm1: Qwen3's attention with windows in the upper layers, DeepSeek-V3's experts."""

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
from ktcore.graph.windows import every_window, marked_sliding, wide_enough

DEFAULTS = Defaults(
    hub={
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
        "rope_theta": 10000.0,
        "num_key_value_heads": 32,
        "head_dim": DERIVED,
        "attention_bias": False,
        "sliding_window": 4096,
        "max_window_layers": 62,
        "layer_types": None,
        "first_k_dense_replace": 0,
        "moe_layer_freq": 1,
        "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
        "n_group": 1,
        "topk_group": 1,
        "norm_topk_prob": False,
        "routed_scaling_factor": 1.0,
    },
    null={"num_key_value_heads": DERIVED, "sliding_window": 0, "layer_types": [], "norm_topk_prob": False},
    gguf={**DEEPSEEK_GGUF, "expert_gating_func": SIGMOID},
    biases=dict.fromkeys("qkvo", "attention_bias"),
)
"""Of `Dots1Config`; `scoring_func`, `topk_method` and `moe_layer_freq` are what its code does."""


def build_dots1(settings: Settings) -> Graph:
    """`dots1` of hub folders and of GGUF files."""
    settings = _published(settings).under(DEFAULTS)
    make = NodeMaker(settings, {**ATTENTION, **MOE})

    def attention(name: str, layer: int) -> Node:
        return gqa_node(make, name, layer, "half", qk_norm=True, window=_window(settings, layer))

    return decoder_graph(make, "gqa_moe", attention, deepseek_ffn(make))


def _published(s: Settings) -> Settings:
    """Released files name the method of choice where others name the function of the scores."""
    if s.gguf or s.given("scoring_func") != "noaux_tc":
        return s
    return s.within({**s.config, "scoring_func": "sigmoid"})


def _window(s: Settings, layer: int) -> int:
    window, marked = every_window(s), marked_sliding(s, layer)
    if marked is None:
        marked = bool(window) and layer >= s.integer("max_window_layers", "", least=0, without=0)
    return wide_enough(s, window, layer) if marked else 0
