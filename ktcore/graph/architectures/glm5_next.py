"""GLM-5.3-Flash: Kimi delta attention, every fourth layer latent attention over pools that an indexer chooses, both
between residual streams; experts whose SwiGLU is held within a limit."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from ktcore.graph.architectures.deepseek_mla import Sparse, mla_node
from ktcore.graph.architectures.deepseek_moe import DEEPSEEK_GGUF, deepseek_routing, dense_layers
from ktcore.graph.architectures.deepseek_v32 import FULL, indexer_types
from ktcore.graph.architectures.kimi_linear import linear_sizes
from ktcore.graph.decoder import decoder_graph, rms_eps
from ktcore.graph.defaults import DERIVED, Defaults
from ktcore.graph.experts import Experts, moe_node
from ktcore.graph.gating import SIGMOID
from ktcore.graph.kda import KDA, Sizes, kda_node
from ktcore.graph.maker import NodeMaker
from ktcore.graph.names import HYPER_CONNECTION, INDEXER, MLA, MOE, POOLS
from ktcore.graph.node import Graph, Node
from ktcore.graph.settings import Settings
from ktcore.graph.streams import hyper_connections
from ktcore.ops.mlp import ClampedGLU

LINEAR, INDEXED = "linear_attention", "indexed_attention"
# words of hub files and of transformers' class for the same kind
WORDS = {LINEAR: LINEAR, **dict.fromkeys((INDEXED, "full_attention", "deepseek_sparse_attention"), INDEXED)}

DEFAULTS = Defaults(
    hub={
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
        "max_position_embeddings": 1048576,
        "kv_lora_rank": 512,
        "q_lora_rank": 1536,
        "qk_nope_head_dim": 256,
        "qk_rope_head_dim": 0,
        "v_head_dim": 256,
        "attention_bias": False,
        "layer_types": None,
        "linear_attn_config": {},
        "linear_head_dim": 128,
        "linear_num_heads": 64,
        "linear_conv_kernel_dim": 4,
        "linear_lower_bound": -5.0,
        "mlp_layer_types": None,
        "first_k_dense_replace": 3,
        "n_shared_experts": 1,
        "n_routed_experts": 288,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": 2048,
        "n_group": 1,
        "topk_group": 1,
        "norm_topk_prob": True,
        "routed_scaling_factor": 2.5,
        "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
        "swiglu_limit": 10.0,
        "hc_mult": 4,
        "hc_eps": 1e-6,
        "hc_sinkhorn_iters": 20,
        "index_topk": 2048,
        "index_n_heads": 32,
        "index_head_dim": 128,
        "index_kpool": 16,
        "indexer_types": None,
        "index_topk_pattern": None,
        "index_topk_freq": 1,
        "index_skip_topk_offset": 2,
    },
    null=dict.fromkeys(
        (
            *("layer_types", "mlp_layer_types", "indexer_types", "index_topk_pattern"),
            # of GGUF files, which may lack these
            *("swiglu_clamp_exp", "swiglu_clamp_shexp", "kda.gate_lower_bound"),
        )
    ),
    gguf={
        **DEEPSEEK_GGUF,
        "expert_gating_func": SIGMOID,
        "swiglu_clamp_exp": None,
        "swiglu_clamp_shexp": None,
        "attention.indexer.types": DERIVED,
        "attention.indexer.kpool_select_tail": True,
        "kda.gate_lower_bound": None,
    },
    biases=dict.fromkeys(("q_a", "kv_a", "o"), "attention_bias"),
    # what the class does whatever these say, and hub files hold
    only={
        "index_kpool_always_select_tail": (True,),
        "mla_use_nope": (True,),
        "mhc": (True,),
        "moe_layer_freq": (1,),
        "qk_rope_head_dim": (0,),
    },
)
"""Of `Glm5NextTextConfig` in transformers, and of `glm5-next` in llama.cpp."""


def build_glm5_next(settings: Settings) -> Graph:
    """`glm5_next_text` of hub folders, `glm5-next` of GGUF files."""
    settings = settings.under(DEFAULTS)
    make = NodeMaker(settings, {**MLA, **INDEXER, **POOLS, **KDA, **MOE, **HYPER_CONNECTION})
    hidden, eps = settings.integer("hidden_size", "embedding_length"), rms_eps(make)
    kinds, dense, sizes = _kinds(settings), _dense(settings), _sizes(settings)
    pool = settings.integer("index_kpool", "attention.indexer.kpool", least=2)
    routing = deepseek_routing(make, next((i for i, one in enumerate(dense) if not one), 0))
    streams = hyper_connections(
        make,
        hidden,
        settings.integer("hc_mult", "hyper_connection.count"),
        rounds=settings.integer("hc_sinkhorn_iters", "hyper_connection.sinkhorn_iterations"),
        eps=settings.number("hc_eps", "hyper_connection.epsilon"),
        rms_eps=eps,
        weighted_end=False,
    )

    def attention(name: str, layer: int) -> Node:
        if kinds[layer] == LINEAR:
            return _bare(kda_node(make, name, sizes))
        return _bare(mla_node(make, name, sparse=Sparse(None, pool), rotates=False, inner_eps=eps))

    def ffn(name: str, layer: int) -> Node:
        clamped, of_shared = (_limit(settings, key, layer) for key in ("swiglu_clamp_exp", "swiglu_clamp_shexp"))
        if dense[layer]:
            width = settings.integer("intermediate_size", "feed_forward_length", layer=layer)
            return _bare(make.mlp(name, hidden, width, eps=eps, clamped=of_shared))
        width = settings.integer("moe_intermediate_size", "expert_feed_forward_length", layer=layer)
        shared = settings.integer("n_shared_experts", "expert_shared_count", least=0) * width
        kind = Experts(clamped=clamped)
        return _bare(moe_node(make, name, hidden, width, eps, routing, shared, kind=kind, shared_clamped=of_shared))

    return decoder_graph(make, "glm5_next", attention, ffn, streams)


def _bare(branch: Node) -> Node:
    """The branch as it is between streams, without a residual of its own."""
    spec: Any = branch.spec
    return replace(branch, spec=replace(spec, residual=False))


def _kinds(s: Settings) -> list[str]:
    """Each layer's attention: `layer_types`, or all but every fourth are delta attention; GGUF: no key heads."""
    layers = s.layers() - s.integer("", "nextn_predict_layers", least=0, without=0)
    if s.gguf:
        kinds = [INDEXED if s.get("", "attention.head_count_kv", layer=i) else LINEAR for i in range(layers)]
        own = [s.get("", "attention.indexer.types", derived=True, layer=i) for i in range(layers)]
        if not all(found for found, kind in zip(own, kinds, strict=True) if kind == INDEXED):
            raise s.error("attention.indexer.types says that a layer shares an indexer, which is not supported here")
        if not s.flag("", "attention.indexer.kpool_select_tail"):
            raise s.error("attention.indexer.kpool_select_tail is false, which is not supported here")
        return kinds
    given = s.get("layer_types", "")
    if given is None:
        kinds = [LINEAR if i % 4 != 3 else INDEXED for i in range(layers)]
    elif isinstance(given, list) and len(given) >= layers and set(given[:layers]) <= set(WORDS):
        kinds = [WORDS[word] for word in given[:layers]]
    else:
        raise s.error(f"layer_types is {given!r}, one of {', '.join(WORDS)} is needed for each of {layers} layers")
    for full, kind in zip(indexer_types(s), kinds, strict=True):
        # no choice is handed on over a layer of delta attention, in transformers neither
        if kind == INDEXED and full != FULL:
            raise s.error("indexer_types says that a layer shares an indexer, which is not supported here")
    return kinds


def _dense(s: Settings) -> list[bool]:
    """Which layers have an MLP: listed, or the first three; the key of hub files for that may not say otherwise."""
    if s.gguf:
        return dense_layers(s)
    layers = s.layers()
    dense = dense_layers(s) if s.get("mlp_layer_types", "") is not None else [i < 3 for i in range(layers)]
    first = s.integer("first_k_dense_replace", "", least=0)
    if s.given("first_k_dense_replace") is not None and dense != [i < first for i in range(layers)]:
        raise s.error(
            f"first_k_dense_replace is {first}, but dense are layers {[i for i, one in enumerate(dense) if one]}",
            "transformers' class goes by mlp_layer_types, or takes the first three",
        )
    return dense


def _sizes(s: Settings) -> Sizes:
    if s.gguf:
        heads = s.integer("", "attention.head_count")
        bound = s.get("", "kda.gate_lower_bound")
        return Sizes(heads, s.integer("", "kda.head_dim"), s.integer("", "ssm.conv_kernel", least=2), _bound(s, bound))
    section = s.get("linear_attn_config", "")
    bound = s.get("linear_lower_bound", "")
    if isinstance(section, dict) and section:
        bound = section.get("gate_lower_bound", bound)
        # the class takes a bound wherever this section does not switch it off
        bound = -5.0 if bound is None and section.get("safe_gate", True) else bound
    return linear_sizes(s, _bound(s, bound))


def _bound(s: Settings, value: Any) -> float | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not -1e4 < value < 0:
        raise s.error(f"{'kda.' if s.gguf else ''}gate_lower_bound is {value!r}, a number below 0 is needed")
    return float(value)


def _limit(s: Settings, gguf: str, layer: int) -> ClampedGLU | None:
    """SwiGLU's, of experts, or of shared ones and dense layers, for which files may leave theirs to the other key."""
    value = s.get("swiglu_limit", gguf, layer=layer)
    if value is None and gguf == "swiglu_clamp_shexp":
        return _limit(s, "swiglu_clamp_exp", layer)
    if value is None or (value == 0 and s.gguf):
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < float("inf"):
        raise s.error(f"{gguf if s.gguf else 'swiglu_limit'} is {value!r}, a number above 0 is needed")
    return ClampedGLU(1.0, float(value), plus=0.0)
