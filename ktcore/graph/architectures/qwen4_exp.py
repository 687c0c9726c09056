"""Qwen3.8-Flash-Next: Qwen3.5's layers between gated residual streams, attention over blocks, a table of n-grams."""

from __future__ import annotations

from ktcore.graph.attention import gqa_node
from ktcore.graph.block_indexer import MEAN_INDEXER, block_indexer_node
from ktcore.graph.decoder import decoder_graph, rms_eps
from ktcore.graph.defaults import Defaults
from ktcore.graph.delta_net import SPLIT_DELTA_NET, delta_net_node
from ktcore.graph.experts import Routing, moe_node
from ktcore.graph.maker import NodeMaker
from ktcore.graph.names import ATTENTION, MOE, SHARED_EXPERT
from ktcore.graph.ngram import MOST_TOKENS, NGRAM, ngram_layers, ngram_node
from ktcore.graph.node import Graph, Node
from ktcore.graph.settings import Settings
from ktcore.graph.streams import GATED_STREAMS, gated_streams
from ktcore.ops.block_indexer import BlockIndexCacheSpec

LINEAR = ("linear_attention", "mamba")
SPARSE = ("full_attention", "indexed_attention", "attention", "qwen_sparse_attention")
BUDGET = ("indexer_budget", "attention.indexer.top_k")

DEFAULTS = Defaults(
    hub={
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
        "rope_theta": 10000.0,
        "partial_rotary_factor": 1.0,
        "num_key_value_heads": 2,
        "head_dim": 256,
        "attention_bias": False,
        "layer_types": None,
        "full_attention_interval": 4,
        "linear_conv_kernel_dim": 4,
        "linear_key_head_dim": 128,
        "linear_value_head_dim": 128,
        "linear_num_key_heads": 16,
        "linear_num_value_heads": 32,
        "output_gate_type": None,
        "num_experts_per_tok": 10,
        "moe_intermediate_size": 512,
        "shared_expert_intermediate_size": 512,
        "hc_count": 4,
        "hc_lowrank": 320,
        "ple_layer_ids": None,
        "ple_embed_dim": None,
        "ple_conv_kernel_size": 4,
        "ngram_size": 3,
        "heads_per_ngram": 8,
        "ngram_vocab_size_base": 20_000_000,
        "make_ngram_vocab_size_divisible_by": 128,
        "seed": 1234,
        "split_ngram_parts": 512,
    },
    null={"layer_types": [], "output_gate_type": "silu", "ple_layer_ids": []},
    gguf={"full_attention_interval": 4, "ple.layers": []},
    biases=dict.fromkeys("qkvo", "attention_bias"),
    only={"norm_topk_prob": (True,), "indexer_kv_heads": (1,), "hidden_act": ("silu",), "attn_output_gate": (True,)},
    left_out={"mtp.": "the layer that predicts a further token"},
)
"""Of `Qwen4ExpTextConfig` in transformers, and of `qwen4exp` in llama.cpp."""


def build_qwen4_exp(settings: Settings) -> Graph:
    """`qwen4_exp_text` of hub folders, whose norms are zero-centred; `qwen4exp` of GGUF files, whose are not."""
    s = settings.under(DEFAULTS)
    names = {**ATTENTION, **MOE, **SHARED_EXPERT, **SPLIT_DELTA_NET, **MEAN_INDEXER, **NGRAM, **GATED_STREAMS}
    make = NodeMaker(s, names, norm_offset=0.0 if s.gguf else 1.0)
    hidden, eps = s.integer("hidden_size", "embedding_length"), rms_eps(make)
    count = s.integer("hc_count", "hyper_connection.count", least=2)
    rank = s.integer("hc_lowrank", "hyper_connection.low_rank")
    tables = ngram_layers(s)
    if tables and not s.gguf and s.integer("vocab_size", "") > MOST_TOKENS:
        raise s.error(f"vocab_size is above {MOST_TOKENS}, more than a table of n-grams is known for")
    routing = Routing(
        experts=s.integer("num_experts|num_local_experts", "expert_count"),
        top_k=s.integer("num_experts_per_tok", "expert_used_count"),
        renormalise=True,
        scale=s.number("", "expert_weights_scale", without=1.0) or 1.0,
    )

    def attention(name: str, layer: int) -> Node:
        if _is_linear(make, name, layer):
            return delta_net_node(make, name, tiled=s.gguf, sigmoid_gate=_sigmoid_gate(s), bare=True)
        return gqa_node(
            make,
            name,
            layer,
            "half",
            qk_norm=True,
            partial=True,
            gate=True,
            bare=True,
            indexer=lambda rope: block_indexer_node(make, f"{name}.indexer", _blocks(s, layer), rope),
        )

    def ffn(name: str, layer: int) -> Node:
        width = s.integer("moe_intermediate_size", "expert_feed_forward_length", layer=layer)
        shared = s.integer("shared_expert_intermediate_size", "expert_shared_feed_forward_length")
        return moe_node(make, name, hidden, width, None, routing, shared, shared_gate=True, residual=False)

    def before(layer: int) -> Node | None:
        return ngram_node(make, layer, tables, count) if layer in tables else None

    streams = gated_streams(make, hidden, count, rank, eps)
    return decoder_graph(make, "qwen4_exp", attention, ffn, streams, before=before)


def _is_linear(make: NodeMaker, name: str, layer: int) -> bool:
    """GGUF's tensors tell, config.json lists the layers or names an interval."""
    s = make.settings
    if s.gguf:
        return make.has(f"{name}.conv")
    kinds = s.sequence("layer_types")
    if not kinds:
        return (layer + 1) % s.integer("full_attention_interval", "") != 0
    kind = kinds[layer] if layer < len(kinds) else None
    if kind not in (*LINEAR, *SPARSE):
        raise s.error(f"layer_types says {kind!r} of layer {layer}", f"known: {', '.join((*LINEAR, *SPARSE))}")
    return kind in LINEAR


def _blocks(s: Settings, layer: int) -> BlockIndexCacheSpec:
    heads = s.integer("indexer_n_heads", "attention.indexer.head_count")
    dim = s.integer("indexer_head_dim", "attention.indexer.key_length")
    ratio = s.integer("indexer_compress_ratio", "attention.compress_ratios", layer=layer)
    budget = s.integer(*BUDGET)
    if budget % ratio:
        raise s.error(f"{budget} tokens are no whole number of blocks of {ratio}", s.about(BUDGET))
    return BlockIndexCacheSpec(heads, dim, ratio, budget // ratio, "mean")


def _sigmoid_gate(s: Settings) -> bool:
    """Of the delta net's result. GGUF does not say: llama.cpp takes the sigmoid."""
    found = s.get("output_gate_type", "", without="sigmoid")
    if found not in ("sigmoid", "silu"):
        raise s.error(f"output_gate_type is {found!r}", "known: sigmoid, silu")
    return bool(found == "sigmoid")
