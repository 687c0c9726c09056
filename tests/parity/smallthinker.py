"""SmallThinker in plain torch after its paper (arXiv 2507.20984), since transformers does not have it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from safetensors.torch import save_file

CONFIG: dict[str, Any] = {
    "architectures": ["SmallThinkerForCausalLM"],
    "model_type": "smallthinker",
    "vocab_size": 256,
    "hidden_size": 64,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1.5e6,
    "rope_layout": [0, 1, 1, 1, 0],
    "sliding_window_layout": [0, 1, 1, 1, 0],
    "sliding_window_size": 16,
    "moe_num_primary_experts": 8,
    "moe_num_active_primary_experts": 3,
    "moe_ffn_hidden_size": 48,
    "moe_primary_router_apply_softmax": False,
    "tie_word_embeddings": False,
}
Tensors = Mapping[str, torch.Tensor]


def weights(config: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """Random tensors with the hub's names."""
    g = torch.Generator().manual_seed(11)
    c, out = config, {}
    hidden, dim, width = c["hidden_size"], c["head_dim"], c["moe_ffn_hidden_size"]

    def linear(name: str, rows: int, columns: int) -> None:
        out[f"{name}.weight"] = torch.randn(rows, columns, generator=g) * 0.1

    def norm(name: str) -> None:
        out[f"{name}.weight"] = 1 + 0.2 * torch.randn(hidden, generator=g)

    linear("model.embed_tokens", c["vocab_size"], hidden)
    if not c["tie_word_embeddings"]:
        linear("lm_head", c["vocab_size"], hidden)
    norm("model.norm")
    for i in range(c["num_hidden_layers"]):
        at = f"model.layers.{i}"
        norm(f"{at}.input_layernorm")
        norm(f"{at}.post_attention_layernorm")
        for role, heads in (("q", c["num_attention_heads"]), *((r, c["num_key_value_heads"]) for r in "kv")):
            linear(f"{at}.self_attn.{role}_proj", heads * dim, hidden)
        linear(f"{at}.self_attn.o_proj", hidden, c["num_attention_heads"] * dim)
        linear(f"{at}.block_sparse_moe.primary_router", c["moe_num_primary_experts"], hidden)
        for e in range(c["moe_num_primary_experts"]):
            expert = f"{at}.block_sparse_moe.experts.{e}"
            linear(f"{expert}.gate", width, hidden)
            linear(f"{expert}.up", width, hidden)
            linear(f"{expert}.down", hidden, width)
    return out


def logits(c: Mapping[str, Any], w: Tensors, ids: torch.Tensor) -> torch.Tensor:
    """Logits [T, vocab] of ids [T], token by token and expert by expert."""
    x = w["model.embed_tokens.weight"][ids]
    for i in range(c["num_hidden_layers"]):
        at = f"model.layers.{i}"
        before = x
        x = x + _attention(c, w, f"{at}.self_attn", i, _rms(c, x, w[f"{at}.input_layernorm.weight"]))
        x = x + _experts(c, w, f"{at}.block_sparse_moe", before, _rms(c, x, w[f"{at}.post_attention_layernorm.weight"]))
    x = _rms(c, x, w["model.norm.weight"])
    return x @ w["model.embed_tokens.weight" if c["tie_word_embeddings"] else "lm_head.weight"].T


def _rms(c: Mapping[str, Any], x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.rms_norm(x, x.shape[-1:], weight, c["rms_norm_eps"])


def _attention(c: Mapping[str, Any], w: Tensors, at: str, layer: int, n: torch.Tensor) -> torch.Tensor:
    dim, tokens = c["head_dim"], len(n)
    q, k, v = ((n @ w[f"{at}.{r}_proj.weight"].T).view(tokens, -1, dim).transpose(0, 1) for r in "qkv")
    if c["rope_layout"][layer]:
        angle = torch.arange(tokens)[:, None] * c["rope_theta"] ** -(torch.arange(0, dim, 2) / dim)
        turn = torch.polar(torch.ones_like(angle), angle)
        q, k = (_turned(t, turn) for t in (q, k))
    k, v = (t.repeat_interleave(len(q) // len(t), 0) for t in (k, v))
    i, j = torch.arange(tokens)[:, None], torch.arange(tokens)[None]
    seen = j <= i
    if c["sliding_window_layout"][layer]:
        seen &= i - j < c["sliding_window_size"]
    out = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=seen)
    return out.transpose(0, 1).reshape(tokens, -1) @ w[f"{at}.o_proj.weight"].T


def _turned(x: torch.Tensor, turn: torch.Tensor) -> torch.Tensor:
    first, second = x.chunk(2, -1)
    y = torch.complex(first, second) * turn
    return torch.cat((y.real, y.imag), -1)


def _experts(c: Mapping[str, Any], w: Tensors, at: str, before: torch.Tensor, n: torch.Tensor) -> torch.Tensor:
    chosen = (before @ w[f"{at}.primary_router.weight"].T).topk(c["moe_num_active_primary_experts"], -1)
    if c["moe_primary_router_apply_softmax"]:
        share = chosen.values.softmax(-1)
    else:
        share = chosen.values.sigmoid() / chosen.values.sigmoid().sum(-1, keepdim=True)
    out = torch.zeros_like(n)
    for t in range(len(n)):
        for e, weight in zip(chosen.indices[t].tolist(), share[t], strict=True):
            gate, up, down = (w[f"{at}.experts.{e}.{role}.weight"] for role in ("gate", "up", "down"))
            out[t] += weight * (down @ (torch.relu(gate @ n[t]) * (up @ n[t])))
    return out


def save_folder(c: Mapping[str, Any], w: Tensors, folder: Path) -> Path:
    """As on the hub."""
    (folder / "config.json").write_text(json.dumps(c))
    save_file(dict(w), folder / "model.safetensors")
    return folder


def save_gguf(c: Mapping[str, Any], w: Tensors, path: Path, *, half: bool = False) -> Path:
    """As llama.cpp's converter writes it, in float32 or with matrices other than the router's in float16."""
    arch = gguf.MODEL_ARCH.SMALLTHINKER
    out = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[arch])
    out.add_tokenizer_model("none")
    out.add_vocab_size(c["vocab_size"])
    out.add_block_count(c["num_hidden_layers"])
    out.add_context_length(c["max_position_embeddings"])
    out.add_embedding_length(c["hidden_size"])
    out.add_head_count(c["num_attention_heads"])
    out.add_head_count_kv(c["num_key_value_heads"])
    out.add_key_length(c["head_dim"])
    out.add_value_length(c["head_dim"])
    out.add_rope_dimension_count(c["head_dim"])
    out.add_rope_freq_base(c["rope_theta"])
    out.add_layer_norm_rms_eps(c["rms_norm_eps"])
    out.add_expert_count(c["moe_num_primary_experts"])
    out.add_expert_used_count(c["moe_num_active_primary_experts"])
    out.add_feed_forward_length(c["moe_ffn_hidden_size"])
    out.add_expert_feed_forward_length(c["moe_ffn_hidden_size"])
    softmax = c["moe_primary_router_apply_softmax"]
    kinds = gguf.ExpertGatingFuncType
    out.add_expert_gating_func(kinds.SOFTMAX if softmax else kinds.SIGMOID)
    if any(c["sliding_window_layout"]):
        out.add_sliding_window(c["sliding_window_size"])
    names = gguf.get_tensor_name_map(arch, c["num_hidden_layers"])
    tensors = {name: value for name, value in w.items() if ".experts." not in name}
    for i in range(c["num_hidden_layers"]):
        for role in ("gate", "up", "down"):
            at = f"model.layers.{i}.block_sparse_moe.experts"
            tensors[f"{at}.{role}.weight"] = torch.stack(
                [w[f"{at}.{e}.{role}.weight"] for e in range(c["moe_num_primary_experts"])]
            )
    for name, value in tensors.items():
        stored = names.get_name(name, try_suffixes=(".weight",))
        assert stored is not None
        out.add_tensor(
            stored,
            value.numpy().astype(np.float16 if half and value.dim() > 1 and "router" not in name else np.float32),
        )
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()
    return path
