"""Settings of tiny models for transformers' configurations, every size distinct where two could be mixed up."""

from __future__ import annotations

from typing import Any

Settings = dict[str, Any]

BASE: Settings = {
    "vocab_size": 256,
    "max_position_embeddings": 4096,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.1,
}
GQA: Settings = BASE | {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
MLA: Settings = BASE | {
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 24,
    "intermediate_size": 128,
    "moe_intermediate_size": 32,
}


def plain_rope(theta: float) -> Settings:
    """Rotary settings without scaling."""
    return {"rope_type": "default", "rope_theta": theta}


def yarn_rope(mscale: float, **changes: Any) -> Settings:
    """YaRN beyond a trained context of 64 tokens."""
    return {
        "rope_type": "yarn",
        "rope_theta": 1e4,
        "factor": 40.0,
        "original_max_position_embeddings": 64,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "mscale": mscale,
        "mscale_all_dim": mscale,
    } | changes


def qwen3_moe(**changes: Any) -> Settings:
    """For `Qwen3MoeConfig`."""
    settings = GQA | {
        "head_dim": 32,
        "num_hidden_layers": 3,
        "intermediate_size": 96,
        "moe_intermediate_size": 32,
        "num_experts": 16,
        "num_experts_per_tok": 4,
        "norm_topk_prob": True,
        "rope_parameters": plain_rope(1e6),
    }
    return settings | changes


def deepseek_v3(**changes: Any) -> Settings:
    """For `DeepseekV3Config`."""
    settings = MLA | {
        "q_lora_rank": 48,
        "num_hidden_layers": 4,
        "n_routed_experts": 16,
        "num_experts_per_tok": 4,
        "n_shared_experts": 1,
        "n_group": 4,
        "topk_group": 2,
        "routed_scaling_factor": 2.5,
        "norm_topk_prob": True,
        "first_k_dense_replace": 2,
        "rope_interleave": True,
        "num_mtp_layers": 0,
        "rope_parameters": yarn_rope(1.0),
    }
    return settings | changes
