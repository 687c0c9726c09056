"""Tiny Qwen3.8-Flash-Next models: weights that transformers leaves at zero, and what converters to GGUF do to them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import gguf
import torch
from transformers import PreTrainedConfig, PreTrainedModel, Qwen4ExpTextConfig
from transformers.models.qwen4_exp.modeling_qwen4_exp import Qwen4ExpTextNGramEmbedding, _build_layer_multipliers

from ktcore.conformance.levels.tiny_configs import GQA, plain_rope

EOS = 24
"""A token that the prompts of these tests hold."""


def config(**changes: Any) -> Qwen4ExpTextConfig:
    """Blocks of 4 tokens of which 3 are seen, 16 index heads, four hashed heads."""
    settings = dict(
        GQA,
        head_dim=32,
        num_hidden_layers=4,
        linear_conv_kernel_dim=4,
        linear_key_head_dim=16,
        linear_value_head_dim=16,
        linear_num_key_heads=2,
        linear_num_value_heads=6,
        rope_parameters=plain_rope(1e7)
        | {"partial_rotary_factor": 0.25, "mrope_section": [2, 1, 1], "mrope_interleaved": True},
        output_gate_type="sigmoid",
        moe_intermediate_size=32,
        shared_expert_intermediate_size=48,
        num_experts=16,
        num_experts_per_tok=4,
        hc_count=4,
        hc_lowrank=24,
        ple_layer_ids=[2],
        ple_embed_dim=64,
        heads_per_ngram=2,
        ngram_vocab_size_base=100,
        make_ngram_vocab_size_divisible_by=8,
        split_ngram_parts=4,
        indexer_n_heads=16,
        indexer_kv_heads=1,
        indexer_head_dim=64,
        indexer_budget=12,
        indexer_compress_ratio=4,
        eos_token_id=EOS,
    )
    return Qwen4ExpTextConfig(**(settings | changes))


def fill(model: PreTrainedModel) -> None:
    """Random values where a fresh model has zeros or so little that nothing shows."""
    if model.config.model_type != "qwen4_exp_text":
        return
    for name, value in model.named_parameters():
        if ".ple." in name and value.dim() > 1:
            value.normal_(std=1.0 if "embedding" in name else 0.3)
        elif "hyper_connection" in name and value.dim() > 1:
            value.normal_(std=0.1)
        elif "index_qk_proj" in name:
            value.normal_(std=0.3)


MIXERS = (
    (r"model\.layers\.(\d+)\.attn_hyper_connection\.", r"blk.\1.hc_attn_"),
    (r"model\.layers\.(\d+)\.mlp_hyper_connection\.", r"blk.\1.hc_ffn_"),
    (r"model\.hyper_connection_mixer\.", "output_hc_"),
)
PARTS = {
    "hc_norm": "norm",
    "input_mix_weight_down": "down",
    "input_mix_weight_up": "up",
    "block_inject_weight": "inject",
    "key_proj": "ple_key",
    "value_proj": "ple_value",
    "norm_key": "ple_norm_key",
    "norm_query": "ple_norm_query",
    "norm_conv": "ple_norm_conv",
    "conv1d": "ple_conv1d",
}


def add_keys(w: gguf.GGUFWriter, c: PreTrainedConfig) -> None:
    """The keys beyond those of Qwen3.5."""
    multipliers, sizes, offsets = hashes(c)
    keys = {
        "hyper_connection.count": c.hc_count,
        "hyper_connection.low_rank": c.hc_lowrank,
        "attention.indexer.head_count": c.indexer_n_heads,
        "attention.indexer.key_length": c.indexer_head_dim,
        "attention.indexer.top_k": c.indexer_budget,
        "ple.ngram_size": c.ngram_size,
        "ple.heads_per_ngram": c.heads_per_ngram,
        "ple.conv_kernel": c.ple_conv_kernel_size,
        "ple.eos_token_id": c.eos_token_id,
        "embedding_length_per_layer_input": c.ple_embed_dim // len(sizes),
    }
    for key, value in keys.items():
        w.add_uint32(f"{w.arch}.{key}", value)
    ratios = [0 if kind == "linear_attention" else c.indexer_compress_ratio for kind in c.layer_types]
    arrays = {"attention.compress_ratios": ratios, "ple.layers": [i - 1 for i in c.ple_layer_ids]}
    for key, values in arrays.items():
        w.add_array(f"{w.arch}.{key}", values)
    for key, values in (("layer_multipliers", multipliers), ("head_offsets", offsets), ("head_vocab_sizes", sizes)):
        kinds = gguf.GGUFValueType
        w.add_key_value(f"{w.arch}.ple.{key}", values, kinds.ARRAY, sub_type=kinds.UINT64)


def hashes(c: PreTrainedConfig) -> tuple[list[int], list[int], list[int]]:
    """Multipliers, sizes and offsets of the layer with a table, as transformers' class makes them."""
    with torch.device("meta"):
        made = Qwen4ExpTextNGramEmbedding(c, c.ple_embed_dim, c.ple_layer_ids[0] - 1, 0)
    multipliers = _build_layer_multipliers(c.vocab_size, c.ngram_size, 0, c.seed)
    return multipliers.tolist(), made.head_vocab_sizes, made.head_offsets


def converted(c: PreTrainedConfig, name: str, value: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    """Tensors that Qwen3.5 lacks, under their GGUF names; "" for what becomes a key, and nothing for all others."""
    layer = re.match(r"model\.layers\.(\d+)\.", name)
    part = name.removesuffix(".weight").rsplit(".", 1)[-1]
    for pattern, stored in MIXERS:
        if re.match(pattern, name):
            begin = re.sub(pattern + ".*", stored, name)
            yield f"{begin}{PARTS[part]}.weight", value + 1 if part == "hc_norm" else value
    if layer is None:
        return
    block = f"blk.{layer[1]}."
    if part == "index_qk_proj":
        q, k = value.split((c.indexer_n_heads * c.indexer_head_dim, c.indexer_head_dim))
        yield f"{block}indexer.q_proj.weight", q
        yield f"{block}indexer.k_proj.weight", k
    elif ".indexer." in name:
        yield f"{block}indexer.{part[0]}_norm.weight", value + 1
    elif ".ple_embedding." in name:
        yield "per_layer_token_embd.weight" if part == "ngram_embedding" else "", value
    elif ".ple." in name:
        value = value + 1 if "norm" in part else value.squeeze() if part == "conv1d" else value
        yield f"{block}{PARTS[part]}.weight", value
