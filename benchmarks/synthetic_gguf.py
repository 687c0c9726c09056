#!/usr/bin/env python3
"""Writes a GGUF file of Qwen3-30B-A3B's shape with random weights, for measurements without a download.

    python benchmarks/synthetic_gguf.py --layers 8 out.gguf

Weights are random Q4_K and Q6_K blocks scaled to about 1/sqrt(fan-in), so that routing is close to uniform. The
vocabulary is made up: models of this file are fed token ids.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Q

DISTINCT = 8192


@dataclass(frozen=True)
class Shape:
    """Sizes of the model; the defaults are those of Qwen3-30B-A3B."""

    hidden: int = 2048
    intermediate: int = 768
    experts: int = 128
    top_k: int = 8
    heads: int = 32
    kv_heads: int = 4
    head_dim: int = 128
    vocab: int = 32768


SMALL = Shape(hidden=256, intermediate=256, experts=8, top_k=2, heads=4, kv_heads=2, head_dim=64, vocab=1024)


def random_blocks(rng: np.random.Generator, rows: int, cols: int, kind: Q) -> np.ndarray:
    """uint8 [rows, bytes]: at most `DISTINCT` distinct blocks of Q4_K or Q6_K, again and again."""
    block, size = gguf.GGML_QUANT_SIZES[kind]
    count = rows * (cols // block)
    distinct = min(count, DISTINCT)
    blocks = rng.integers(0, 256, size=(distinct, size), dtype=np.uint8)

    def put(column: int, value: float) -> None:
        scale = (value / np.sqrt(cols) * rng.uniform(0.8, 1.2, distinct)).astype(np.float16)
        blocks[:, column : column + 2] = scale.view(np.uint8).reshape(distinct, 2)

    if kind == Q.Q4_K:
        put(0, 1 / 147)
        put(2, 1 / 20)
    else:
        blocks[:, 192:208] = rng.integers(20, 40, size=(distinct, 16)).astype(np.uint8)
        put(208, 1 / 555)
    return np.tile(blocks, (-(-count // distinct), 1))[:count].reshape(rows, -1)


def write(path: Path, layers: int, shape: Shape = Shape()) -> None:
    """Write the file."""
    s, rng = shape, np.random.default_rng(0)
    w = gguf.GGUFWriter(path, "qwen3moe")
    w.add_block_count(layers)
    w.add_context_length(40960)
    w.add_embedding_length(s.hidden)
    w.add_feed_forward_length(s.intermediate)
    w.add_head_count(s.heads)
    w.add_head_count_kv(s.kv_heads)
    w.add_key_length(s.head_dim)
    w.add_value_length(s.head_dim)
    w.add_rope_freq_base(1e6)
    w.add_layer_norm_rms_eps(1e-6)
    w.add_expert_count(s.experts)
    w.add_expert_used_count(s.top_k)
    w.add_expert_feed_forward_length(s.intermediate)
    w.add_tokenizer_model("gpt2")
    w.add_tokenizer_pre("smollm")
    w.add_token_list(["<s>", "</s>", "a", "b", "ab", *(f"token{i}" for i in range(5, s.vocab))])
    w.add_token_types([gguf.TokenType.NORMAL] * s.vocab)
    w.add_token_merges(["a b"])
    w.add_bos_token_id(0)
    w.add_eos_token_id(1)

    def matrix(name: str, rows: int, cols: int, kind: Q = Q.Q4_K, stack: int = 0) -> None:
        blocks = random_blocks(rng, rows * max(stack, 1), cols, kind)
        w.add_tensor(name, blocks.reshape(stack, rows, -1) if stack else blocks, raw_dtype=kind)

    def ones(name: str, size: int) -> None:
        w.add_tensor(name, np.ones(size, np.float32))

    matrix("token_embd.weight", s.vocab, s.hidden)
    matrix("output.weight", s.vocab, s.hidden, Q.Q6_K)
    ones("output_norm.weight", s.hidden)
    for i in range(layers):
        b = f"blk.{i}."
        ones(b + "attn_norm.weight", s.hidden)
        ones(b + "ffn_norm.weight", s.hidden)
        ones(b + "attn_q_norm.weight", s.head_dim)
        ones(b + "attn_k_norm.weight", s.head_dim)
        matrix(b + "attn_q.weight", s.heads * s.head_dim, s.hidden)
        matrix(b + "attn_k.weight", s.kv_heads * s.head_dim, s.hidden)
        matrix(b + "attn_v.weight", s.kv_heads * s.head_dim, s.hidden, Q.Q6_K)
        matrix(b + "attn_output.weight", s.hidden, s.heads * s.head_dim)
        router = rng.standard_normal((s.experts, s.hidden)) / np.sqrt(s.hidden)
        w.add_tensor(b + "ffn_gate_inp.weight", router.astype(np.float32))
        matrix(b + "ffn_gate_exps.weight", s.intermediate, s.hidden, stack=s.experts)
        matrix(b + "ffn_up_exps.weight", s.intermediate, s.hidden, stack=s.experts)
        matrix(b + "ffn_down_exps.weight", s.hidden, s.intermediate, Q.Q6_K, stack=s.experts)
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()


def main() -> None:
    """The command line above."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--small", action="store_true", help="a toy of the same architecture")
    a = parser.parse_args()
    write(a.out, a.layers, SMALL if a.small else Shape())


if __name__ == "__main__":
    main()
