"""Small models with random weights to be packed: a BF16 folder with routed experts, and a dense GGUF file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM


def tiny_moe(folder: Path, seed: int = 0, **changes: Any) -> Path:
    """Qwen3-MoE, two layers of eight experts; `changes` of its configuration."""
    torch.manual_seed(seed)
    settings: dict[str, Any] = {
        "vocab_size": 256,
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "intermediate_size": 96,
        "moe_intermediate_size": 64,
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "max_position_embeddings": 512,
    }
    Qwen3MoeForCausalLM(Qwen3MoeConfig(**(settings | changes))).to(torch.bfloat16).save_pretrained(folder)
    return folder


def llama_gguf(path: Path) -> Path:
    """Random weights, Q8_0."""
    rng = np.random.default_rng(0)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(512)
    writer.add_embedding_length(64)
    writer.add_block_count(1)
    writer.add_feed_forward_length(96)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(256)
    shapes = {"attn_q": (64, 64), "attn_k": (32, 64), "attn_v": (32, 64), "attn_output": (64, 64)}
    shapes |= {"ffn_gate": (96, 64), "ffn_up": (96, 64), "ffn_down": (64, 96)}
    tensors = {"token_embd.weight": (256, 64), "output.weight": (256, 64)}
    for name, shape in {**tensors, **{f"blk.0.{n}.weight": s for n, s in shapes.items()}}.items():
        values = rng.standard_normal(shape).astype(np.float32) / 8
        raw = gguf.quants.quantize(values, gguf.GGMLQuantizationType.Q8_0)
        writer.add_tensor(name, raw, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    for name in ("output_norm.weight", "blk.0.attn_norm.weight", "blk.0.ffn_norm.weight"):
        writer.add_tensor(name, np.ones(64, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
