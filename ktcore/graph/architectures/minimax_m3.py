"""MiniMax-M3's text model: attention over blocks that each key head has its own choice of, experts within a limit."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ktcore.graph.attention import KV_HEADS, gqa_node
from ktcore.graph.block_indexer import BLOCK_INDEXER, block_indexer_node
from ktcore.graph.decoder import decoder_graph, rms_eps
from ktcore.graph.defaults import Defaults
from ktcore.graph.experts import Experts, Routing, moe_node
from ktcore.graph.gating import SIGMOID, is_sigmoid
from ktcore.graph.maker import NodeMaker
from ktcore.graph.names import ATTENTION, MOE, NameTable
from ktcore.graph.node import Graph, Node
from ktcore.graph.settings import Settings
from ktcore.ops.block_indexer import BlockIndexCacheSpec
from ktcore.ops.mlp import ClampedGLU

HUB: NameTable = {
    **BLOCK_INDEXER,
    "ffn.router": ("block_sparse_moe.gate", "ffn_gate_inp"),
    "ffn.router.bias": ("block_sparse_moe.e_score_correction_bias", "exp_probs_b.bias"),
    "ffn.experts.gate": ("block_sparse_moe.experts.{}.w1", "ffn_gate_exps"),
    "ffn.experts.up": ("block_sparse_moe.experts.{}.w3", "ffn_up_exps"),
    "ffn.experts.down": ("block_sparse_moe.experts.{}.w2", "ffn_down_exps"),
    "ffn.shared.gate": ("block_sparse_moe.shared_experts.gate_proj", "ffn_gate_shexp"),
    "ffn.shared.up": ("block_sparse_moe.shared_experts.up_proj", "ffn_up_shexp"),
    "ffn.shared.down": ("block_sparse_moe.shared_experts.down_proj", "ffn_down_shexp"),
}
IN_MEMORY: NameTable = {
    "attn.indexer.q": ("self_attn.indexer.q_proj", ""),
    "attn.indexer.k": ("self_attn.indexer.k_proj", ""),
    "attn.indexer.q_norm": ("self_attn.indexer.q_norm", ""),
    "attn.indexer.k_norm": ("self_attn.indexer.k_norm", ""),
    "ffn.router": ("mlp.gate", ""),
    "ffn.router.bias": ("mlp.gate.e_score_correction_bias", ""),
    "ffn.shared.gate": ("", ""),
    "ffn.shared.up": ("", ""),
    "ffn.shared.gate_up": ("mlp.shared_experts.gate_up_proj", ""),
    "ffn.shared.down": ("mlp.shared_experts.down_proj", ""),
}
"""What transformers has in memory, gate and up in one."""
FULL, SPARSE = "full_attention", "minimax_m3_sparse"
NESTED = {
    "index_n_heads": "sparse_num_index_heads",
    "index_head_dim": "sparse_index_dim",
    "index_block_size": "sparse_block_size",
    "index_topk_blocks": "sparse_topk_blocks",
    "index_local_blocks": "sparse_local_block",
}
"""Keys of the class -> those of `sparse_attention_config` in the hub's files, which count first."""
ONLY_NESTED = {"use_sparse_attention": (True,), "sparse_score_type": ("max",), "sparse_init_block": (0,)}
GGUF_LIMITS = (1.702, 7.0)
"""Alpha and limit that llama.cpp takes, of which its files do not say anything."""

DEFAULTS = Defaults(
    hub={
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
        "rope_theta": 5e6,
        "partial_rotary_factor": 1.0,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "intermediate_size": 3072,
        "dense_intermediate_size": 12288,
        "shared_intermediate_size": 3072,
        "num_local_experts": 128,
        "num_experts_per_tok": 4,
        "routed_scaling_factor": 2.0,
        "swiglu_alpha": 1.702,
        "swiglu_limit": 7.0,
        "layer_types": None,
        "mlp_layer_types": None,
        "moe_layer_freq": None,
        "sparse_attention_config": None,
        "index_n_heads": 4,
        "index_head_dim": 128,
        "index_block_size": 128,
        "index_topk_blocks": 16,
        "index_local_blocks": 1,
    },
    null=dict.fromkeys(("layer_types", "mlp_layer_types", "moe_layer_freq", "sparse_attention_config")),
    gguf={"expert_gating_func": SIGMOID, "leading_dense_block_count": 0, "expert_weights_scale": 1.0},
    # keys of the hub's files that the class does not read: what it does
    only={
        "scoring_func": ("sigmoid",),
        "use_routing_bias": (True,),
        "use_qk_norm": (True,),
        "qk_norm_type": ("per_head",),
        "use_gemma_norm": (True,),
        "attention_output_gate": (False,),
        "n_shared_experts": (1,),
        "hidden_act": ("silu", "swigluoai"),
    },
    left_out={"mtp.": "layers that predict further tokens"},
)
"""Of `MiniMaxM3VLTextConfig` in transformers, and of `minimax-m3` in llama.cpp."""


def build_minimax_m3(settings: Settings) -> Graph:
    """`minimax_m3_vl_text` of hub folders, whose norms are zero-centred; `minimax-m3` of GGUF files, whose are not."""
    s = _flat(settings.under(DEFAULTS))
    holds = s.checkpoint.holds
    fused = any(holds(f"{_model(s)}layers.{i}.mlp.gate.weight") for i in range(s.layers()))
    names = {**ATTENTION, **MOE, **HUB, **(IN_MEMORY if fused else {})}
    make = NodeMaker(s, names, norm_offset=0.0 if s.gguf else 1.0)
    hidden, eps = s.integer("hidden_size", "embedding_length"), rms_eps(make)
    if s.gguf and not is_sigmoid(s):
        raise s.error("expert_gating_func is softmax, which architecture 'minimax-m3' is not known to have")
    alpha, limit = GGUF_LIMITS
    if not s.gguf:
        alpha, limit = s.number("swiglu_alpha", ""), s.number("swiglu_limit", "", positive=True)
    clamped = ClampedGLU(alpha, limit)
    routing = Routing(
        experts=s.integer("num_local_experts|num_experts", "expert_count"),
        top_k=s.integer("num_experts_per_tok", "expert_used_count"),
        score="sigmoid",
        choice_bias=True,
        renormalise=True,
        scale=s.number("routed_scaling_factor", "expert_weights_scale"),
    )

    def attention(name: str, layer: int) -> Node:
        sparse = make.has(f"{name}.indexer.q") if s.gguf else _kind(s, "layer_types", (FULL, SPARSE), layer) == SPARSE
        cache = _blocks(s, layer) if sparse else None
        indexer = None if cache is None else lambda rope: block_indexer_node(make, f"{name}.indexer", cache, rope)
        return gqa_node(make, name, layer, "half", qk_norm=True, partial=True, indexer=indexer)

    def ffn(name: str, layer: int) -> Node:
        if _is_dense(s, layer):
            width = s.integer("dense_intermediate_size", "feed_forward_length", layer=layer)
            return make.mlp(name, hidden, width, eps=eps, clamped=clamped, activation="silu")
        width = s.integer("intermediate_size", "expert_feed_forward_length", layer=layer)
        count = s.integer("", "expert_shared_count", without=1)
        shared = s.integer("shared_intermediate_size", "", without=width * count)
        kind = Experts(activation="silu", clamped=clamped)
        return moe_node(make, name, hidden, width, eps, routing, shared, shared_clamped=clamped, kind=kind)

    return decoder_graph(make, "minimax_m3", attention, ffn)


def _model(s: Settings) -> str:
    return s.wrapper.model if s.wrapper else "model."


def _flat(s: Settings) -> Settings:
    """Settings with the keys of the class, as `MiniMaxM3VLTextConfig.__post_init__` derives them."""
    if s.gguf:
        return s
    nested = s.get("sparse_attention_config", "") or {}
    if not isinstance(nested, Mapping):
        raise s.error(f"sparse_attention_config is {nested!r}, an object of settings is needed")
    for key, known in ONLY_NESTED.items():
        if key in nested and nested[key] not in known:
            raise s.error(f"{key} is {nested[key]!r}, only {known[0]!r} is known here")
    # the activation is written out in the class, whatever hidden_act says
    flat: dict[str, Any] = {**s.config, "hidden_act": "silu"}
    flat.update({key: nested[name] for key, name in NESTED.items() if name in nested})
    for key, said, words in (
        ("layer_types", nested.get("sparse_attention_freq"), (FULL, SPARSE)),
        ("mlp_layer_types", s.get("moe_layer_freq", ""), ("dense", "sparse")),
    ):
        if s.get(key, "") is None and said is not None:
            if not isinstance(said, list):
                raise s.error(f"{'sparse_attention_freq' if key == 'layer_types' else 'moe_layer_freq'} is {said!r}")
            flat[key] = [words[bool(value)] for value in said]
    return s.within(flat)


def _kind(s: Settings, key: str, words: tuple[str, str], layer: int) -> str:
    """Of a layer; where nothing is said, all attention is full and all layers have experts."""
    kinds = s.get(key, "")
    if kinds is None:
        return words[0] if key == "layer_types" else words[1]
    if not isinstance(kinds, list) or layer >= len(kinds) or kinds[layer] not in words:
        raise s.error(f"{key} is {kinds!r:.200}, '{words[0]}' or '{words[1]}' is needed for layer {layer}")
    return str(kinds[layer])


def _is_dense(s: Settings, layer: int) -> bool:
    if s.gguf:
        return layer < s.integer("", "leading_dense_block_count", least=0)
    return _kind(s, "mlp_layer_types", ("dense", "sparse"), layer) == "dense"


def _blocks(s: Settings, layer: int) -> BlockIndexCacheSpec:
    heads = s.integer("index_n_heads", "attention.indexer.head_count")
    if heads != s.integer(*KV_HEADS, layer=layer):
        raise s.error(f"index_n_heads is {heads}, one a key head is needed", s.about(KV_HEADS))
    top = s.integer("index_topk_blocks", "attention.indexer.top_k")
    local = s.integer("index_local_blocks", "attention.indexer.local_blocks", least=0)
    if local > top:
        raise s.error(f"index_local_blocks is {local}, more than the {top} blocks that are seen")
    dim = s.integer("index_head_dim", "attention.indexer.key_length")
    block = s.integer("index_block_size", "attention.indexer.block_size")
    return BlockIndexCacheSpec(heads, dim, block, top, "max", local)
