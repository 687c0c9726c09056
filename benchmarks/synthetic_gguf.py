#!/usr/bin/env python3
"""Writes a GGUF file of a real model's shape with random weights, for measurements without a download.

    python benchmarks/synthetic_gguf.py --layers 8 out.gguf
    python benchmarks/synthetic_gguf.py --shape qwen3.5-35b-a3b --layers 8 out.gguf
    python benchmarks/synthetic_gguf.py --shape qwen3.5-27b --layers 12 --further out.gguf

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
    """Sizes of the model; the defaults are those of Qwen3-30B-A3B.

    Attributes:
        experts: 0: a dense MLP in every layer.
        shared: width of the gated shared expert.
        key_heads, value_heads: of the gated delta net, whose heads are 128 wide; 0: attention in all layers. Else three
            layers in four have it, and attention has a gate and rotates a quarter of each head (Qwen3.5).
    """

    hidden: int = 2048
    intermediate: int = 768
    experts: int = 128
    top_k: int = 8
    heads: int = 32
    kv_heads: int = 4
    head_dim: int = 128
    vocab: int = 32768
    shared: int = 0
    key_heads: int = 0
    value_heads: int = 0


SHAPES = {
    "qwen3-30b-a3b": Shape(),
    "qwen3.5-35b-a3b": Shape(
        intermediate=512, experts=256, heads=16, kv_heads=2, head_dim=256, shared=512, key_heads=16, value_heads=32
    ),
    "qwen3.5-27b": Shape(
        hidden=5120, intermediate=17408, experts=0, heads=24, kv_heads=4, head_dim=256, key_heads=16, value_heads=48
    ),
}
SMALL = Shape(hidden=256, intermediate=256, experts=8, top_k=2, heads=4, kv_heads=2, head_dim=64, vocab=1024)
STATE, CONV, INTERVAL = 128, 4, 4


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


class File:
    """The file being written: keys, then tensors."""

    def __init__(self, path: Path, layers: int, shape: Shape) -> None:
        self.s, self.layers, self.rng = shape, layers, np.random.default_rng(0)
        sparse = "moe" if shape.experts else ""
        self.w = gguf.GGUFWriter(path, f"qwen35{sparse}" if shape.key_heads else "qwen3moe")

    def keys(self) -> None:
        """Sizes and a vocabulary."""
        s, w = self.s, self.w
        w.add_block_count(self.layers)
        w.add_context_length(40960)
        w.add_embedding_length(s.hidden)
        w.add_feed_forward_length(s.intermediate)
        w.add_head_count(s.heads)
        w.add_head_count_kv(s.kv_heads)
        w.add_key_length(s.head_dim)
        w.add_value_length(s.head_dim)
        w.add_rope_freq_base(1e7 if s.key_heads else 1e6)
        w.add_layer_norm_rms_eps(1e-6)
        if s.experts:
            w.add_expert_count(s.experts)
            w.add_expert_used_count(s.top_k)
            w.add_expert_feed_forward_length(s.intermediate)
        if s.shared:
            w.add_expert_shared_feed_forward_length(s.shared)
        if s.key_heads:
            quarter = s.head_dim // 4
            w.add_rope_dimension_count(quarter)
            w.add_rope_dimension_sections([11, 11, 10, 0])
            w.add_full_attention_interval(INTERVAL)
            w.add_ssm_conv_kernel(CONV)
            w.add_ssm_state_size(STATE)
            w.add_ssm_group_count(s.key_heads)
            w.add_ssm_time_step_rank(s.value_heads)
            w.add_ssm_inner_size(s.value_heads * STATE)
        w.add_tokenizer_model("gpt2")
        w.add_tokenizer_pre("smollm")
        w.add_token_list(["<s>", "</s>", "a", "b", "ab", *(f"token{i}" for i in range(5, s.vocab))])
        w.add_token_types([gguf.TokenType.NORMAL] * s.vocab)
        w.add_token_merges(["a b"])
        w.add_bos_token_id(0)
        w.add_eos_token_id(1)

    def matrix(self, name: str, rows: int, cols: int, kind: Q = Q.Q4_K, stack: int = 0) -> None:
        """A quantised matrix, or a stack of them."""
        blocks = random_blocks(self.rng, rows * max(stack, 1), cols, kind)
        self.w.add_tensor(f"{name}.weight", blocks.reshape(stack, rows, -1) if stack else blocks, raw_dtype=kind)

    def ones(self, name: str, size: int) -> None:
        """A norm's weight."""
        self.w.add_tensor(f"{name}.weight", np.ones(size, np.float32))

    def floats(self, name: str, *shape: int) -> None:
        """A small float32 tensor."""
        self.w.add_tensor(name, (self.rng.standard_normal(shape) / np.sqrt(shape[-1])).astype(np.float32))

    def attention(self, b: str) -> None:
        """A layer's attention, gated where other layers have a delta net."""
        s = self.s
        self.ones(f"{b}attn_q_norm", s.head_dim)
        self.ones(f"{b}attn_k_norm", s.head_dim)
        self.matrix(f"{b}attn_q", s.heads * s.head_dim * (2 if s.key_heads else 1), s.hidden)
        self.matrix(f"{b}attn_k", s.kv_heads * s.head_dim, s.hidden)
        self.matrix(f"{b}attn_v", s.kv_heads * s.head_dim, s.hidden, Q.Q6_K)
        self.matrix(f"{b}attn_output", s.hidden, s.heads * s.head_dim)

    def delta_net(self, b: str) -> None:
        """A layer's gated delta net."""
        s = self.s
        inner, channels = s.value_heads * STATE, (2 * s.key_heads + s.value_heads) * STATE
        self.matrix(f"{b}attn_qkv", channels, s.hidden)
        self.matrix(f"{b}attn_gate", inner, s.hidden)
        self.floats(f"{b}ssm_conv1d.weight", channels, CONV)
        self.floats(f"{b}ssm_dt.bias", s.value_heads)
        self.w.add_tensor(f"{b}ssm_a", -np.exp(self.rng.uniform(0.1, 2.2, s.value_heads)).astype(np.float32))
        self.matrix(f"{b}ssm_beta", s.value_heads, s.hidden)
        self.matrix(f"{b}ssm_alpha", s.value_heads, s.hidden)
        self.ones(f"{b}ssm_norm", STATE)
        self.matrix(f"{b}ssm_out", s.hidden, inner)

    def ffn(self, b: str) -> None:
        """A layer's mixture of experts, or its MLP."""
        s = self.s
        if not s.experts:
            self.matrix(f"{b}ffn_gate", s.intermediate, s.hidden)
            self.matrix(f"{b}ffn_up", s.intermediate, s.hidden)
            self.matrix(f"{b}ffn_down", s.hidden, s.intermediate, Q.Q6_K)
            return
        self.floats(f"{b}ffn_gate_inp.weight", s.experts, s.hidden)
        self.matrix(f"{b}ffn_gate_exps", s.intermediate, s.hidden, stack=s.experts)
        self.matrix(f"{b}ffn_up_exps", s.intermediate, s.hidden, stack=s.experts)
        self.matrix(f"{b}ffn_down_exps", s.hidden, s.intermediate, Q.Q6_K, stack=s.experts)
        if s.shared:
            self.floats(f"{b}ffn_gate_inp_shexp.weight", s.hidden)
            self.matrix(f"{b}ffn_gate_shexp", s.shared, s.hidden)
            self.matrix(f"{b}ffn_up_shexp", s.shared, s.hidden)
            self.matrix(f"{b}ffn_down_shexp", s.hidden, s.shared, Q.Q6_K)


def write(path: Path, layers: int, shape: Shape = Shape(), further: bool = False) -> None:
    """Write the file; with `further` there is one more layer, which predicts further tokens."""
    f, s = File(path, layers + further, shape), shape
    f.keys()
    if further:
        f.w.add_nextn_predict_layers(1)
    f.matrix("token_embd", s.vocab, s.hidden)
    f.matrix("output", s.vocab, s.hidden, Q.Q6_K)
    f.ones("output_norm", s.hidden)
    for i in range(layers + further):
        b = f"blk.{i}."
        f.ones(f"{b}attn_norm", s.hidden)
        f.ones(f"{b}{'post_attention_norm' if s.key_heads else 'ffn_norm'}", s.hidden)
        if s.key_heads and (i + 1) % INTERVAL and i < layers:
            f.delta_net(b)
        else:
            f.attention(b)
        f.ffn(b)
    if further:
        b = f"blk.{layers}.nextn."
        f.matrix(f"{b}eh_proj", s.hidden, 2 * s.hidden)
        for norm in ("enorm", "hnorm", "shared_head_norm"):
            f.ones(f"{b}{norm}", s.hidden)
    f.w.write_header_to_file()
    f.w.write_kv_data_to_file()
    f.w.write_tensors_to_file()
    f.w.close()


def main() -> None:
    """The command line above."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--shape", choices=sorted(SHAPES), default="qwen3-30b-a3b")
    parser.add_argument("--small", action="store_true", help="a toy of the first architecture")
    parser.add_argument("--further", action="store_true", help="with a layer that predicts further tokens")
    a = parser.parse_args()
    write(a.out, a.layers, SMALL if a.small else SHAPES[a.shape], a.further)


if __name__ == "__main__":
    main()
