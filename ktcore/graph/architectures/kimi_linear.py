"""Kimi Linear: three layers of Kimi delta attention to one of latent attention without positions, Kimi-K2's experts."""

from __future__ import annotations

from ktcore.graph.architectures.deepseek_mla import mla_node
from ktcore.graph.architectures.deepseek_moe import gguf_groups
from ktcore.graph.decoder import decoder_graph, rms_eps
from ktcore.graph.defaults import DERIVED, Defaults
from ktcore.graph.experts import Routing, moe_node
from ktcore.graph.gating import is_sigmoid
from ktcore.graph.kda import KDA, Sizes, kda_node
from ktcore.graph.maker import NodeMaker
from ktcore.graph.names import MLA, MOE, NameTable
from ktcore.graph.node import Graph, Node
from ktcore.graph.settings import Settings

_MOE = "block_sparse_moe"
NAMES: NameTable = {
    "ffn.router": (f"{_MOE}.gate", "ffn_gate_inp"),
    "ffn.router.bias": (f"{_MOE}.gate.e_score_correction_bias", "exp_probs_b.bias"),
    "ffn.experts.gate": (f"{_MOE}.experts.{{}}.w1", "ffn_gate_exps"),
    "ffn.experts.up": (f"{_MOE}.experts.{{}}.w3", "ffn_up_exps"),
    "ffn.experts.down": (f"{_MOE}.experts.{{}}.w2", "ffn_down_exps"),
    "ffn.shared.gate": (f"{_MOE}.shared_experts.gate_proj", "ffn_gate_shexp"),
    "ffn.shared.up": (f"{_MOE}.shared_experts.up_proj", "ffn_up_shexp"),
    "ffn.shared.down": (f"{_MOE}.shared_experts.down_proj", "ffn_down_shexp"),
}

DEFAULTS = Defaults(
    hub={
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
        "model_max_length": 1048576,
        "q_lora_rank": None,
        "kv_lora_rank": 512,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "v_head_dim": 128,
        "attention_bias": False,
        "layer_types": None,
        "linear_attn_config": {},
        "linear_head_dim": 128,
        "linear_num_heads": 32,
        "linear_conv_kernel_dim": 4,
        "mlp_layer_types": None,
        "first_k_dense_replace": 1,
        "num_shared_experts": 1,
        "num_experts_per_token": 8,
        "num_expert_group": 1,
        "topk_group": 1,
        "moe_renormalize": True,
        "moe_intermediate_size": 1024,
        "routed_scaling_factor": 2.446,
    },
    null={"q_lora_rank": 0, "layer_types": None, "mlp_layer_types": None},
    gguf={
        "attention.q_lora_rank": 0,
        "attention.key_length_mla": DERIVED,
        "attention.value_length_mla": DERIVED,
        "leading_dense_block_count": 0,
        "expert_group_count": 0,
        "expert_gating_func": 0,
    },
    biases=dict.fromkeys(("q_a", "kv_a", "o"), "attention_bias"),
    # what the class does whatever these say, and hub files hold
    only={
        "mla_use_nope": (True,),
        "moe_layer_freq": (1,),
        "moe_router_activation_func": ("sigmoid",),
        "num_nextn_predict_layers": (0,),
    },
)
"""Of `KimiLinearConfig` in transformers, and of `kimi-linear` in llama.cpp."""

LINEAR, FULL = "linear_attention", "full_attention"


def build_kimi_linear(settings: Settings) -> Graph:
    """`kimi_linear` of hub folders, `kimi-linear` of GGUF files."""
    settings = settings.under(DEFAULTS)
    make = NodeMaker(settings, {**MLA, **KDA, **MOE, **NAMES})
    hidden = settings.integer("hidden_size", "embedding_length")
    eps = rms_eps(make)
    kinds, dense = _kinds(settings), _dense(settings)
    sizes = _sizes(settings)
    routing = _routing(settings)
    shared = settings.integer("num_shared_experts|n_shared_experts", "expert_shared_count", least=0)

    def attention(name: str, layer: int) -> Node:
        if kinds[layer] == LINEAR:
            return kda_node(make, name, sizes)
        return mla_node(make, name, rotates=False)

    def ffn(name: str, layer: int) -> Node:
        if dense[layer]:
            return make.mlp(name, hidden, settings.integer("intermediate_size", "feed_forward_length"), eps=eps)
        width = settings.integer("moe_intermediate_size", "expert_feed_forward_length", layer=layer)
        return moe_node(make, name, hidden, width, eps, routing, shared * width)

    return decoder_graph(make, "kimi_linear", attention, ffn, context="model_max_length|max_position_embeddings")


def _sizes(s: Settings) -> Sizes:
    if s.gguf:
        heads = s.integer("", "attention.head_count")
        return Sizes(heads, s.integer("", "kda.head_dim"), s.integer("", "ssm.conv_kernel", least=2), None)
    return linear_sizes(s, None)


def linear_sizes(s: Settings, lower_bound: float | None) -> Sizes:
    """Of hub folders: the section `linear_attn_config`, and the class's own keys where that lacks them."""
    section = s.get("linear_attn_config", "")
    inside = s.within(section, DEFAULTS)
    keys = ("num_heads", "linear_num_heads"), ("head_dim", "linear_head_dim")
    heads, width = (inside.integer(a, "") if a in section else s.integer(b, "") for a, b in keys)
    a, b = "short_conv_kernel_size", "linear_conv_kernel_dim"
    conv = inside.integer(a, "", least=2) if a in section else s.integer(b, "", least=2)
    return Sizes(heads, width, conv, lower_bound)


def _kinds(s: Settings) -> list[str]:
    """Each layer's attention: `layer_types`, or two lists of layers that count from 1; GGUF: no key heads."""
    layers = s.layers()
    if s.gguf:
        counts = [s.get("", "attention.head_count_kv", layer=i) for i in range(layers)]
        return [FULL if count else LINEAR for count in counts]
    kinds = s.get("layer_types", "")
    section = s.get("linear_attn_config", "")
    if kinds is None and isinstance(section, dict) and {"full_attn_layers", "kda_layers"} <= section.keys():
        full, linear = section["full_attn_layers"], section["kda_layers"]
        if not all(isinstance(part, list) for part in (full, linear)) or sorted([*full, *linear]) != [
            *range(1, layers + 1)
        ]:
            raise s.error(f"full_attn_layers and kda_layers do not name each of {layers} layers once, from 1")
        return [FULL if i + 1 in full else LINEAR for i in range(layers)]
    if kinds is None:
        return [FULL if i and i % 4 == 0 else LINEAR for i in range(layers)]
    if not isinstance(kinds, list) or len(kinds) < layers or not set(kinds) <= {FULL, LINEAR}:
        raise s.error(f"layer_types is {kinds!r}, '{LINEAR}' or '{FULL}' is needed for each of {layers} layers")
    return kinds


def _dense(s: Settings) -> list[bool]:
    layers = s.layers()
    kinds = s.get("mlp_layer_types", "", without=None)
    if kinds is None:
        first = s.integer("first_k_dense_replace", "leading_dense_block_count", least=0)
        return [i < first for i in range(layers)]
    if not isinstance(kinds, list) or len(kinds) < layers or not set(kinds) <= {"dense", "sparse"}:
        raise s.error(f"mlp_layer_types is {kinds!r}, 'dense' or 'sparse' is needed for each of {layers} layers")
    return [kind == "dense" for kind in kinds]


def _routing(s: Settings) -> Routing:
    if s.gguf:
        if not is_sigmoid(s):
            raise s.error("expert_gating_func is softmax, which no Kimi Linear has", "known: 2 (sigmoid)")
        groups, kept = gguf_groups(s)
    else:
        groups, kept = s.integer("num_expert_group|n_group", ""), s.integer("topk_group", "")
        if kept > groups:
            raise s.error(f"topk_group is {kept}, num_expert_group {groups}: fewer groups than are to be kept")
    return Routing(
        experts=s.integer("num_experts|num_local_experts", "expert_count"),
        top_k=s.integer("num_experts_per_token|num_experts_per_tok", "expert_used_count"),
        score="sigmoid",
        choice_bias=True,
        groups=groups,
        groups_kept=kept,
        group_score="top2_sum",
        renormalise=s.flag("moe_renormalize|norm_topk_prob", "", without=True),
        renorm_eps=1e-20,
        scale=s.number("routed_scaling_factor", "expert_weights_scale"),
    )
