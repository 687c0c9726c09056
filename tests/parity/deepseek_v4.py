"""Tiny DeepSeek-V4 models, and checkpoints with the names and keys of the hub, which transformers rewrites."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import DeepseekV4Config, PreTrainedModel

RATIOS = {"sliding_attention": 0, "compressed_sparse_attention": 4, "heavily_compressed_attention": 128}
REPLACED = ("layer_types", "mlp_layer_types", "compress_rates", "rope_parameters", "partial_rotary_factor")
"""Keys that files of the hub have in another form."""

# what follows "layers.N." in transformers -> on the hub, the first that matches
LAYER = (
    (r"self_attn\.compressor\.indexer\.scorer\.", "attn.indexer."),
    (r"self_attn\.compressor\.indexer\.q_b_proj", "attn.indexer.wq_b"),
    (r"self_attn\.compressor\.indexer\.", "attn.indexer.compressor."),
    (r"self_attn\.sinks", "attn.attn_sink"),
    (r"self_attn\.", "attn."),
    (r"mlp\.gate\.e_score_correction_bias", "ffn.gate.bias"),
    (r"mlp\.", "ffn."),
    (r"input_layernorm", "attn_norm"),
    (r"post_attention_layernorm", "ffn_norm"),
    (r"(attn|ffn)_hc\.", r"hc_\1_"),
)
PARTS = {
    "compressor.kv_norm": "compressor.norm",
    "q_a_proj": "wq_a",
    "q_a_norm": "q_norm",
    "q_b_proj": "wq_b",
    "attn.kv_proj": "attn.wkv",
    "o_a_proj": "wo_a",
    "o_b_proj": "wo_b",
    "compressor.kv_proj": "compressor.wkv",
    "compressor.gate_proj": "compressor.wgate",
    "position_bias": "ape",
    "shared_experts.gate_proj": "shared_experts.w1",
    "shared_experts.up_proj": "shared_experts.w3",
    "shared_experts.down_proj": "shared_experts.w2",
}
OUTSIDE = {
    "model.embed_tokens.weight": "embed.weight",
    "model.norm.weight": "norm.weight",
    "lm_head.weight": "head.weight",
    "model.hc_head.hc_fn": "hc_head_fn",
    "model.hc_head.hc_base": "hc_head_base",
    "model.hc_head.hc_scale": "hc_head_scale",
}


def config(**changes: Any) -> DeepseekV4Config:
    """Every kind of layer; a window, a budget of entries and a ratio that prompts of 96 tokens are longer than."""
    settings: dict[str, Any] = {
        "vocab_size": 256,
        "hidden_size": 96,
        "num_hidden_layers": 5,
        "num_attention_heads": 4,
        "head_dim": 64,
        "qk_rope_head_dim": 16,
        "q_lora_rank": 48,
        "o_groups": 2,
        "o_lora_rank": 28,
        "compress_ratios": [0, 0, 4, 128, 4],
        "compress_rate_hca": 32,
        "num_hash_layers": 2,
        "sliding_window": 8,
        "index_n_heads": 16,
        "index_head_dim": 64,  # llama.cpp takes blocks of 64 values
        "index_topk": 8,
        "swiglu_limit": 0.3,
        "moe_intermediate_size": 40,
        "n_routed_experts": 8,
        "num_experts_per_tok": 3,
        "rope_scaling": {"type": "yarn", "factor": 8.0, "original_max_position_embeddings": 32},
        "max_position_embeddings": 256,
        "initializer_range": 0.15,
    }
    return DeepseekV4Config(**(settings | changes))


def fill(model: PreTrainedModel) -> None:
    """Different experts for every token id, where a layer goes by it."""
    for name, table in model.named_buffers():
        if name.endswith("tid2eid"):
            rows = [torch.randperm(model.config.n_routed_experts)[: table.shape[1]] for _ in range(len(table))]
            table.copy_(torch.stack(rows))


def save(model: PreTrainedModel, folder: Path) -> Path:
    """config.json and safetensors as the hub has them."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(hub_config(model.config)))
    save_file({name: value.clone() for name, value in hub_tensors(model)}, folder / "model.safetensors")
    return folder


def hub_config(c: DeepseekV4Config) -> dict[str, Any]:
    """Keys of the hub's files; a ratio more than there are layers, for the one that predicts a further token."""
    kept = {key: value for key, value in json.loads(json.dumps(c.to_dict())).items() if key not in REPLACED}
    scaling = {key: value for key, value in c.rope_parameters["compress"].items() if key not in OUTSIDE_ROPE}
    rates = {"compress_rate_csa": "compressed_sparse_attention", "compress_rate_hca": "heavily_compressed_attention"}
    return {
        **kept,
        **{key: c.compress_rates[kind] for key, kind in rates.items() if c.compress_rates[kind] != RATIOS[kind]},
        "compress_ratios": [*(RATIOS[kind] for kind in c.layer_types), 0],
        "num_hash_layers": c.mlp_layer_types.count("hash_moe"),
        "qk_rope_head_dim": c.qk_rope_head_dim,
        "rope_theta": c.rope_parameters["main"]["rope_theta"],
        "compress_rope_theta": c.rope_parameters["compress"]["rope_theta"],
        "rope_scaling": scaling,
    }


OUTSIDE_ROPE = ("rope_theta", "partial_rotary_factor", "rope_type", "attention_factor")


def hub_tensors(model: PreTrainedModel) -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor with its name on the hub; experts one by one, and one that belongs to a further layer."""
    for name, value in model.state_dict().items():
        if name in OUTSIDE:
            yield OUTSIDE[name], value
            continue
        layer, rest = re.fullmatch(r"model\.layers\.(\d+)\.(.+)", name).groups()  # type: ignore[union-attr]
        where = f"layers.{layer}."
        if rest == "mlp.experts.gate_up_proj":
            for e, both in enumerate(value):
                gate, up = both.chunk(2)
                yield f"{where}ffn.experts.{e}.w1.weight", gate
                yield f"{where}ffn.experts.{e}.w3.weight", up
        elif rest == "mlp.experts.down_proj":
            for e, down in enumerate(value):
                yield f"{where}ffn.experts.{e}.w2.weight", down
        else:
            yield where + _renamed(rest), value
    yield "mtp.0.enorm.weight", torch.ones(model.config.hidden_size)


def _renamed(rest: str) -> str:
    pattern, stands = next(pair for pair in LAYER if re.match(pair[0], rest))
    name = re.sub(f"^{pattern}", stands, rest)
    for part, short in PARTS.items():
        name = name.replace(part, short)
    return name
