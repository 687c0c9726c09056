"""Mistral Small 4: latent attention whose queries grow with their position, softmax-routed experts in every layer."""

from __future__ import annotations

from ktcore.graph.architectures.deepseek_mla import mla_node
from ktcore.graph.architectures.deepseek_moe import DEEPSEEK_GGUF, deepseek_ffn, gguf_groups
from ktcore.graph.decoder import decoder_graph
from ktcore.graph.defaults import DERIVED, Defaults
from ktcore.graph.experts import Routing
from ktcore.graph.gating import SOFTMAX, is_sigmoid
from ktcore.graph.maker import NodeMaker
from ktcore.graph.names import MLA, MOE
from ktcore.graph.node import Graph, Node
from ktcore.graph.rotary import TRAINED, rope_section
from ktcore.graph.settings import Settings
from ktcore.ops.attention import Temperature

BETA = 0.1  # how much queries grow: `llama_4_scaling_beta`

DEFAULTS = Defaults(
    hub={
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
        "rope_interleave": True,
        "rope_theta": 10000.0,
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 10000.0,
            "factor": 128.0,
            TRAINED: 8192,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
            "llama_4_scaling_beta": BETA,
        },
        "q_lora_rank": 1024,
        "v_head_dim": 128,
        "attention_bias": False,
        "first_k_dense_replace": 0,
        "moe_layer_freq": 1,
        "n_shared_experts": 1,
        "num_experts_per_tok": 4,
        "n_group": 1,
        "topk_group": 1,
        "norm_topk_prob": True,
        "routed_scaling_factor": 1.0,
    },
    null={"q_lora_rank": 0, "norm_topk_prob": False, "rope_interleave": False},
    gguf={
        **DEEPSEEK_GGUF,
        "expert_gating_func": SOFTMAX,
        "attention.q_lora_rank": 0,
        "attention.key_length_mla": DERIVED,
        "attention.value_length_mla": DERIVED,
        "attention.temperature_scale": BETA,
        "attention.temperature_length": DERIVED,
    },
    biases=dict.fromkeys(("q_a", "kv_a", "o"), "attention_bias"),
)
"""Of `Mistral4Config`, and of `mistral4` in llama.cpp but for the temperature: its converter leaves the keys out, and
llama.cpp then does without, so that it departs from the model after as many tokens as were trained before YaRN."""


def build_mistral4(settings: Settings) -> Graph:
    """`mistral4` of hub folders, alone or as a part, and of GGUF files."""
    settings = settings.under(DEFAULTS)
    make = NodeMaker(settings, {**MLA, **MOE})
    if settings.gguf and is_sigmoid(settings):
        raise settings.error("expert_gating_func is sigmoid, which architecture 'mistral4' is not known to have")
    temperature = _temperature(settings)

    def attention(name: str, layer: int) -> Node:
        return mla_node(make, name, temperature=temperature, share=True)

    return decoder_graph(make, "deepseek_v3", attention, deepseek_ffn(make, routing=_routing(settings)))


def _routing(s: Settings) -> Routing:
    groups, kept = gguf_groups(s) if s.gguf else (s.integer("n_group", ""), s.integer("topk_group", ""))
    scale = s.number("routed_scaling_factor", "expert_weights_scale")
    return Routing(
        experts=s.integer("n_routed_experts|num_local_experts|num_experts", "expert_count"),
        top_k=s.integer("num_experts_per_tok", "expert_used_count"),
        groups=groups,
        groups_kept=kept,
        group_score="top2_sum",
        renormalise=s.flag("norm_topk_prob", "expert_weights_norm"),
        renorm_eps=1e-20,
        scale=scale or 1.0 if s.gguf else scale,
    )


def _temperature(s: Settings) -> Temperature:
    if not s.gguf:
        section = rope_section(s)
        return Temperature(section.number("llama_4_scaling_beta", ""), section.integer(TRAINED, ""), 0.0)
    trained = s.integer("", "rope.scaling.original_context_length", derived=s.integer("", "context_length"))
    span = s.integer("", "attention.temperature_length", derived=trained)
    return Temperature(s.number("", "attention.temperature_scale"), span, 0.0)
