"""Tiny MiniMax-M3 models, folders with the names of the hub, which transformers rewrites, and GGUF's names."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import torch
from safetensors.torch import save_file
from transformers import MiniMaxM3VLTextConfig, PreTrainedConfig, PreTrainedModel

from ktcore.conformance.levels.tiny_configs import GQA, plain_rope

SPARSE = "minimax_m3_sparse"


def config(**changes: Any) -> MiniMaxM3VLTextConfig:
    """Blocks of 4 tokens of which 3 are seen."""
    settings = dict(
        GQA,
        head_dim=32,
        num_hidden_layers=4,
        intermediate_size=32,
        dense_intermediate_size=96,
        shared_intermediate_size=32,
        num_local_experts=16,
        num_experts_per_tok=4,
        rope_parameters=plain_rope(5e6) | {"partial_rotary_factor": 0.5},
        layer_types=["full_attention", SPARSE, SPARSE, SPARSE],
        mlp_layer_types=["dense", "sparse", "sparse", "sparse"],
        index_n_heads=2,
        index_head_dim=64,
        index_block_size=4,
        index_topk_blocks=3,
    )
    return MiniMaxM3VLTextConfig(**(settings | changes))


def limited() -> MiniMaxM3VLTextConfig:
    """Limits that bite, two blocks that are always seen, and a layer of full attention behind sparse ones."""
    kinds = ["full_attention", SPARSE, SPARSE, "full_attention"]
    return config(swiglu_limit=0.6, swiglu_alpha=1.3, index_local_blocks=2, layer_types=kinds)


def fill(model: PreTrainedModel) -> None:
    """Larger values where a fresh model's would hardly show."""
    for name, value in model.named_parameters():
        if value.dim() > 1 and "embed" not in name and "lm_head" not in name:
            value.normal_(std=0.12)


def hub_tensors(c: PreTrainedConfig, name: str, value: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    """Of one tensor in memory those that the hub has."""
    name = re.sub(r"self_attn\.indexer\.([qk])_", r"self_attn.index_\1_", name)
    name = name.replace("mlp.gate.e_score", "block_sparse_moe.e_score").replace("mlp.gate.", "block_sparse_moe.gate.")
    name = re.sub(r"mlp\.(experts|shared_experts)\.", r"block_sparse_moe.\1.", name)
    if name.endswith("experts.gate_up_proj"):
        for e, both in enumerate(value):
            for role, part in zip(("w1", "w3"), both.chunk(2), strict=True):
                yield name.replace("gate_up_proj", f"{e}.{role}.weight"), part
    elif name.endswith("experts.down_proj"):
        yield from ((name.replace("down_proj", f"{e}.w2.weight"), part) for e, part in enumerate(value))
    elif name.endswith("gate_up_proj.weight"):
        for role, part in zip(("gate", "up"), value.chunk(2), strict=True):
            yield name.replace("gate_up", role), part
    else:
        yield name, value


def save(model: PreTrainedModel, folder: Path) -> Path:
    """A folder of the hub's form."""
    model.config.save_pretrained(folder)
    tensors = [pair for name, value in model.state_dict().items() for pair in hub_tensors(model.config, name, value)]
    save_file({name: value.clone() for name, value in tensors}, folder / "model.safetensors", {"format": "pt"})
    return folder


GGUF_NAMES = (
    (r"model\.layers\.(\d+)\.self_attn\.index_([qk])_(proj|norm)\.", r"blk.\1.indexer.\2_\3."),
    (r"model\.layers\.(\d+)\.block_sparse_moe\.shared_experts\.(\w+)_proj\.", r"blk.\1.ffn_\2_shexp."),
)


def converted(c: PreTrainedConfig, name: str, value: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    """What converters to GGUF make of a tensor: 1 is added to norms, experts are one tensor."""
    value = value + 1 if name.endswith("norm.weight") else value
    if name.endswith("experts.gate_up_proj"):
        for role, part in zip(("gate", "up"), value.chunk(2, 1), strict=True):
            yield f"blk.{name.split('.')[2]}.ffn_{role}_exps.weight", part
        return
    if name.endswith("experts.down_proj"):
        yield f"blk.{name.split('.')[2]}.ffn_down_exps.weight", value
        return
    for hub, part in hub_tensors(c, name, value):
        for pattern, stored in GGUF_NAMES:
            hub = re.sub(pattern, stored, hub)
        hub = hub.replace("block_sparse_moe.e_score_correction_bias", "block_sparse_moe.e_score_correction.bias")
        yield hub, part


def add_keys(w: gguf.GGUFWriter, c: PreTrainedConfig) -> None:
    """Keys of experts and of the indexer."""
    w.add_expert_gating_func(gguf.ExpertGatingFuncType.SIGMOID)
    w.add_expert_feed_forward_length(c.intermediate_size)
    w.add_expert_shared_count(1)
    w.add_expert_weights_scale(c.routed_scaling_factor)
    w.add_expert_weights_norm(True)
    w.add_leading_dense_block_count(c.mlp_layer_types.count("dense"))
    for key, value in (
        ("head_count", c.index_n_heads),
        ("key_length", c.index_head_dim),
        ("top_k", c.index_topk_blocks),
        ("block_size", c.index_block_size),
        ("local_blocks", c.index_local_blocks),
    ):
        w.add_uint32(f"{w.arch}.attention.indexer.{key}", value)
