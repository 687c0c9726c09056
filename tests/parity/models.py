"""Tiny random models of every family, with every size distinct where two could be mixed up."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AfmoeConfig,
    AutoModelForCausalLM,
    DeepseekV2Config,
    DeepseekV3Config,
    DeepseekV32Config,
    Dots1Config,
    Ernie4_5_MoeConfig,
    Gemma4TextConfig,
    Glm4Config,
    Glm4MoeConfig,
    Glm4MoeLiteConfig,
    Glm5NextTextConfig,
    GlmMoeDsaConfig,
    GptOssConfig,
    HunYuanMoEV1Config,
    HYV3Config,
    KimiLinearConfig,
    Llama4TextConfig,
    LlamaConfig,
    MiMoV2FlashConfig,
    MiniMaxM2Config,
    Mistral4Config,
    Mistral4ForCausalLM,
    MistralConfig,
    MixtralConfig,
    OlmoeConfig,
    Phi3Config,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen2MoeConfig,
    Qwen3_5MoeTextConfig,
    Qwen3_5TextConfig,
    Qwen3Config,
    Qwen3MoeConfig,
    Qwen3NextConfig,
    SolarOpenConfig,
)

from ktcore.conformance.levels.tiny_configs import GQA, MLA, deepseek_v3, plain_rope, qwen3_moe, yarn_rope

from . import deepseek_v4, glm5_next, minimax_m3, qwen4_exp, step3p7


def _v3(**changes: Any) -> DeepseekV3Config:
    return DeepseekV3Config(**deepseek_v3(**changes))


def _kimi_k2() -> DeepseekV3Config:
    return _v3(
        num_hidden_layers=3,
        n_routed_experts=24,
        num_experts_per_tok=8,
        n_group=1,
        topk_group=1,
        routed_scaling_factor=2.827,
        first_k_dense_replace=1,
        rms_norm_eps=1e-5,
        rope_parameters=yarn_rope(
            1.0, rope_theta=5e4, factor=64.0, beta_fast=1.0, original_max_position_embeddings=2048
        ),
    )


def _moonlight() -> DeepseekV3Config:
    return _v3(
        q_lora_rank=None,
        num_hidden_layers=3,
        num_experts_per_tok=6,
        n_shared_experts=2,
        n_group=1,
        topk_group=1,
        routed_scaling_factor=2.446,
        first_k_dense_replace=1,
        rms_norm_eps=1e-3,
        rope_parameters=plain_rope(5e4),
    )


def _v2(**changes: Any) -> DeepseekV2Config:
    settings = dict(
        MLA,
        q_lora_rank=48,
        num_hidden_layers=3,
        n_routed_experts=16,
        num_experts_per_tok=4,
        n_shared_experts=2,
        n_group=4,
        topk_group=2,
        topk_method="group_limited_greedy",
        routed_scaling_factor=16.0,
        norm_topk_prob=False,
        first_k_dense_replace=1,
        rope_parameters=yarn_rope(0.707),
    )
    return DeepseekV2Config(**(settings | changes))


def _v2_lite() -> DeepseekV2Config:
    return _v2(
        q_lora_rank=None,
        n_routed_experts=8,
        num_experts_per_tok=3,
        n_group=None,
        topk_group=None,
        topk_method="greedy",
        routed_scaling_factor=1.0,
    )


# enough index heads that no score is exactly 0, where any choice would be as good; fewer tokens than the tests' prompts
# (llama.cpp takes blocks of 64 values)
INDEX = {"index_topk": 12, "index_n_heads": 16, "index_head_dim": 64}


def sparse(**changes: Any) -> dict[str, Any]:
    # the class makes a padding token's embedding zero: all index scores of such a token are equal
    settings = deepseek_v3(**INDEX, first_k_dense_replace=1, pad_token_id=None)
    for key in ("rope_interleave", "num_mtp_layers"):
        del settings[key]
    return settings | changes


def _v32(**changes: Any) -> DeepseekV32Config:
    return DeepseekV32Config(**sparse(**changes))


def _glm_dsa(**changes: Any) -> GlmMoeDsaConfig:
    settings = sparse(n_group=1, topk_group=1, rms_norm_eps=1e-5, rope_parameters=plain_rope(1e6))
    return GlmMoeDsaConfig(**(settings | changes))


def _qwen3_moe(**changes: Any) -> Qwen3MoeConfig:
    return Qwen3MoeConfig(**qwen3_moe(**changes))


def _qwen2_moe(**changes: Any) -> Qwen2MoeConfig:
    settings = dict(
        GQA,
        num_hidden_layers=3,
        intermediate_size=96,
        moe_intermediate_size=32,
        shared_expert_intermediate_size=80,
        num_experts=12,
        num_experts_per_tok=4,
        norm_topk_prob=False,
        rope_parameters=plain_rope(1e6),
    )
    return Qwen2MoeConfig(**(settings | changes))


def _glm4_moe(**changes: Any) -> Glm4MoeConfig:
    settings = dict(
        GQA,
        head_dim=32,
        num_hidden_layers=3,
        intermediate_size=96,
        moe_intermediate_size=32,
        n_routed_experts=16,
        num_experts_per_tok=4,
        n_shared_experts=1,
        n_group=1,
        topk_group=1,
        first_k_dense_replace=1,
        routed_scaling_factor=2.5,
        use_qk_norm=True,
        attention_bias=True,
        num_mtp_layers=0,
        rope_parameters=plain_rope(1e6) | {"partial_rotary_factor": 0.5},
    )
    return Glm4MoeConfig(**(settings | changes))


def _qwen3_next(**changes: Any) -> Qwen3NextConfig:
    settings = dict(
        GQA,
        head_dim=32,
        num_hidden_layers=4,
        intermediate_size=96,
        moe_intermediate_size=32,
        shared_expert_intermediate_size=48,
        num_experts=16,
        num_experts_per_tok=4,
        linear_conv_kernel_dim=4,
        linear_key_head_dim=16,
        linear_value_head_dim=16,
        linear_num_key_heads=2,
        linear_num_value_heads=4,
        rope_parameters=plain_rope(1e7) | {"partial_rotary_factor": 0.25},
    )
    return Qwen3NextConfig(**(settings | changes))


DELTA_NET: dict[str, Any] = {
    "linear_conv_kernel_dim": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 6,
    "rope_parameters": plain_rope(1e7)
    | {"partial_rotary_factor": 0.25, "mrope_section": [2, 1, 1], "mrope_interleaved": True},
}


def _qwen3_5(**changes: Any) -> Qwen3_5TextConfig:
    settings = dict(GQA, **DELTA_NET, head_dim=32, num_hidden_layers=4, intermediate_size=96)
    return Qwen3_5TextConfig(**(settings | changes))


def _qwen3_5_moe(**changes: Any) -> Qwen3_5MoeTextConfig:
    settings = dict(
        GQA,
        **DELTA_NET,
        head_dim=32,
        num_hidden_layers=4,
        moe_intermediate_size=32,
        shared_expert_intermediate_size=48,
        num_experts=16,
        num_experts_per_tok=4,
    )
    return Qwen3_5MoeTextConfig(**(settings | changes))


def _kimi_linear(**changes: Any) -> KimiLinearConfig:
    settings = dict(
        MLA,
        q_lora_rank=None,
        num_hidden_layers=4,
        num_experts=16,
        num_experts_per_token=4,
        num_shared_experts=2,
        linear_attn_config={
            "head_dim": 16,
            # as many as attention has: GGUF has one number
            "num_heads": 4,
            "short_conv_kernel_size": 4,
            "full_attn_layers": [2, 4],
            "kda_layers": [1, 3],
        },
        layer_types=None,
    )
    return KimiLinearConfig(**(settings | changes))


def _minimax_m2(**changes: Any) -> MiniMaxM2Config:
    settings = dict(
        GQA,
        head_dim=32,
        num_hidden_layers=3,
        intermediate_size=48,
        num_local_experts=16,
        num_experts_per_tok=4,
        rotary_dim=16,
        rope_parameters=plain_rope(5e6) | {"partial_rotary_factor": 0.5},
    )
    return MiniMaxM2Config(**(settings | changes))


def _glm4_lite(**changes: Any) -> Glm4MoeLiteConfig:
    settings = dict(
        MLA,
        q_lora_rank=48,
        num_hidden_layers=3,
        n_routed_experts=16,
        num_experts_per_tok=4,
        n_shared_experts=1,
        n_group=1,
        topk_group=1,
        routed_scaling_factor=1.8,
        rms_norm_eps=1e-3,
        rope_parameters=plain_rope(1e6),
    )
    return Glm4MoeLiteConfig(**(settings | changes))


def _mistral4(**changes: Any) -> Mistral4Config:
    settings = dict(
        MLA,
        q_lora_rank=48,
        num_hidden_layers=3,
        n_routed_experts=16,
        num_experts_per_tok=4,
        n_shared_experts=1,
        n_group=1,
        topk_group=1,
        first_k_dense_replace=0,
        routed_scaling_factor=1.0,
        rope_parameters=yarn_rope(1.0, factor=16.0, original_max_position_embeddings=16)
        | {"llama_4_scaling_beta": 0.1},
    )
    return Mistral4Config(**(settings | changes))


def _hy_v3(**changes: Any) -> HYV3Config:
    settings = dict(
        GQA,
        head_dim=32,
        num_hidden_layers=3,
        intermediate_size=96,
        moe_intermediate_size=32,
        num_experts=16,
        num_experts_per_tok=4,
        num_shared_experts=2,
        rope_parameters=plain_rope(1.1e7),
    )
    return HYV3Config(**(settings | changes))


def _olmoe(**changes: Any) -> OlmoeConfig:
    settings = dict(
        GQA | {"num_key_value_heads": 4},  # as the released models and llama.cpp have it
        num_hidden_layers=3,
        intermediate_size=48,
        num_experts=16,
        num_experts_per_tok=4,
        rope_parameters=plain_rope(1e4),
    )
    return OlmoeConfig(**(settings | changes))


def _ernie(**changes: Any) -> Ernie4_5_MoeConfig:
    settings = dict(
        GQA,
        num_hidden_layers=4,
        intermediate_size=128,  # kv heads times the shared experts' width, as converters to GGUF take for granted
        moe_intermediate_size=32,
        moe_num_experts=16,
        moe_k=4,
        moe_num_shared_experts=2,
        rope_parameters=plain_rope(5e5),
    )
    return Ernie4_5_MoeConfig(**(settings | changes))


def _dots1(**changes: Any) -> Dots1Config:
    settings = dict(
        GQA | {"num_key_value_heads": 4},  # as the released models and llama.cpp have it
        head_dim=32,
        num_hidden_layers=3,
        intermediate_size=96,
        moe_intermediate_size=32,
        n_routed_experts=16,
        num_experts_per_tok=4,
        n_shared_experts=2,
        first_k_dense_replace=1,
        norm_topk_prob=True,
        routed_scaling_factor=2.5,
        rope_parameters=plain_rope(1e6),
    )
    return Dots1Config(**(settings | changes))


def _solar_open(**changes: Any) -> SolarOpenConfig:
    settings = dict(
        GQA,
        head_dim=32,
        num_hidden_layers=3,
        moe_intermediate_size=32,
        n_routed_experts=16,
        num_experts_per_tok=4,
        n_group=4,
        topk_group=2,
        routed_scaling_factor=1.5,
        rope_parameters=plain_rope(1e6),
    )
    return SolarOpenConfig(**(settings | changes))


def _llama4(**changes: Any) -> Llama4TextConfig:
    llama3 = {
        "rope_type": "llama3",
        "rope_theta": 5e5,
        "factor": 16.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 1.0,
        "original_max_position_embeddings": 64,
    }
    settings = dict(
        GQA,
        head_dim=32,
        num_hidden_layers=4,
        intermediate_size=48,
        intermediate_size_mlp=96,
        num_local_experts=4,
        num_experts_per_tok=1,
        interleave_moe_layer_step=1,
        use_qk_norm=True,
        no_rope_layer_interval=4,
        attention_chunk_size=16,
        floor_scale=16,
        attn_scale=0.1,
        rope_parameters=llama3,
    )
    return Llama4TextConfig(**(settings | changes))


def _gpt_oss(**changes: Any) -> GptOssConfig:
    settings = dict(
        GQA,
        head_dim=32,
        num_hidden_layers=4,
        intermediate_size=48,
        num_local_experts=8,
        num_experts_per_tok=4,
        sliding_window=20,
        rope_parameters={
            "rope_type": "yarn",
            "rope_theta": 1.5e5,
            "factor": 32.0,
            "original_max_position_embeddings": 64,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "truncate": False,
        },
        # which values of this size reach; GGUF files take 7, the released models' own
        swiglu_limit=0.5,
    )
    return GptOssConfig(**(settings | changes))


def _llama(**changes: Any) -> LlamaConfig:
    llama3 = {
        "rope_type": "llama3",
        "rope_theta": 5e5,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }
    settings = dict(GQA, num_hidden_layers=2, intermediate_size=96, rope_parameters=llama3)
    return LlamaConfig(**(settings | changes))


def _gemma4(**changes: Any) -> Gemma4TextConfig:
    settings = dict(
        GQA,
        head_dim=16,
        global_head_dim=32,
        num_global_key_value_heads=1,
        attention_k_eq_v=True,
        num_hidden_layers=4,
        layer_types=["sliding_attention", "full_attention", "sliding_attention", "full_attention"],
        sliding_window=20,
        intermediate_size=96,
        enable_moe_block=True,
        moe_intermediate_size=32,
        num_experts=16,
        top_k_experts=4,
        hidden_size_per_layer_input=0,
        final_logit_softcapping=3.0,
        rope_parameters={
            "sliding_attention": plain_rope(1e4),
            "full_attention": {"rope_type": "proportional", "rope_theta": 1e4, "partial_rotary_factor": 0.25},
        },
    )
    return Gemma4TextConfig(**(settings | changes))


def _mimo(**changes: Any) -> MiMoV2FlashConfig:
    settings = dict(
        GQA,
        head_dim=32,
        v_head_dim=24,
        num_key_value_heads=1,
        num_hidden_layers=4,
        layer_types=["full_attention", "sliding_attention", "sliding_attention", "full_attention"],
        sliding_window_size=20,
        intermediate_size=96,
        moe_intermediate_size=32,
        n_routed_experts=16,
        num_experts_per_tok=4,
    )
    return MiMoV2FlashConfig(**(settings | changes))


def _hunyuan(**changes: Any) -> HunYuanMoEV1Config:
    settings = dict(
        GQA,
        head_dim=32,
        num_hidden_layers=3,
        intermediate_size=48,
        num_experts=16,
        moe_topk=[4, 3, 4],
        rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "alpha": 1000.0, "factor": 1.0},
    )
    return HunYuanMoEV1Config(**(settings | changes))


def _afmoe(**changes: Any) -> AfmoeConfig:
    settings = dict(
        GQA,
        head_dim=32,
        num_hidden_layers=5,
        intermediate_size=96,
        moe_intermediate_size=32,
        num_experts=16,
        num_experts_per_tok=4,
        num_shared_experts=2,
        route_scale=2.5,
        sliding_window=20,
        mup_enabled=True,
        rope_parameters=plain_rope(1e4),
    )
    return AfmoeConfig(**(settings | changes))


CONFIGS: dict[str, Callable[[], PreTrainedConfig]] = {
    "llama": _llama,
    "llama-bias": lambda: _llama(attention_bias=True, mlp_bias=True),
    "llama-linear": lambda: _llama(rope_parameters={"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}),
    "llama-yarn": lambda: _llama(rope_parameters=yarn_rope(0.0)),
    "smollm2": lambda: _llama(
        hidden_size=72,
        num_attention_heads=9,
        num_key_value_heads=3,
        tie_word_embeddings=True,
        rope_parameters=plain_rope(1e5),
    ),
    "llama-wide": lambda: _llama(head_dim=32, tie_word_embeddings=True),
    "mistral": lambda: MistralConfig(
        **GQA, num_hidden_layers=2, intermediate_size=96, sliding_window=None, rope_parameters=plain_rope(1e6)
    ),
    "mistral-window": lambda: MistralConfig(
        **GQA, num_hidden_layers=2, intermediate_size=96, sliding_window=20, rope_parameters=plain_rope(1e6)
    ),
    "qwen2": lambda: Qwen2Config(
        **GQA, num_hidden_layers=2, intermediate_size=96, tie_word_embeddings=True, rope_parameters=plain_rope(1e6)
    ),
    "qwen3": lambda: Qwen3Config(
        **GQA,
        head_dim=32,
        num_hidden_layers=2,
        intermediate_size=96,
        tie_word_embeddings=True,
        rope_parameters=plain_rope(1e6),
    ),
    "qwen3-wide": lambda: Qwen3Config(
        **GQA | {"num_key_value_heads": 4},
        head_dim=24,
        num_hidden_layers=2,
        intermediate_size=96,
        attention_bias=True,
        rope_parameters=plain_rope(1e6),
    ),
    "phi3": lambda: Phi3Config(
        **GQA,
        num_hidden_layers=2,
        intermediate_size=96,
        rope_parameters=plain_rope(1e4),
        original_max_position_embeddings=4096,
    ),
    "glm4": lambda: Glm4Config(
        **GQA,
        head_dim=32,
        num_hidden_layers=2,
        intermediate_size=96,
        attention_bias=True,
        rope_parameters=plain_rope(1e4) | {"partial_rotary_factor": 0.5},
    ),
    "mixtral": lambda: MixtralConfig(
        **GQA,
        num_hidden_layers=2,
        intermediate_size=96,
        num_local_experts=8,
        num_experts_per_tok=2,
        sliding_window=None,
        rope_parameters=plain_rope(1e6),
    ),
    "qwen2-moe": _qwen2_moe,
    "qwen2-moe-mixed": lambda: _qwen2_moe(mlp_only_layers=[1], norm_topk_prob=True),
    "qwen2-moe-window": lambda: _qwen2_moe(use_sliding_window=True, sliding_window=20, max_window_layers=2),
    "glm4-moe": _glm4_moe,
    "glm4-air": lambda: _glm4_moe(use_qk_norm=False, n_shared_experts=2, routed_scaling_factor=1.0),
    "qwen3-moe": _qwen3_moe,
    "qwen3-moe-mixed": lambda: _qwen3_moe(mlp_only_layers=[1], norm_topk_prob=False),
    "qwen3-moe-step": lambda: _qwen3_moe(decoder_sparse_step=2),
    "qwen3-next": _qwen3_next,
    "qwen3-next-wide": lambda: _qwen3_next(
        linear_value_head_dim=24, linear_conv_kernel_dim=3, linear_num_value_heads=6, mlp_only_layers=[2]
    ),
    "qwen3.5": _qwen3_5,
    "qwen3.5-tied": lambda: _qwen3_5(
        linear_value_head_dim=24,
        linear_num_value_heads=2,
        tie_word_embeddings=True,
        layer_types=["full_attention", "linear_attention", "full_attention", "linear_attention"],
    ),
    "qwen3.5-moe": _qwen3_5_moe,
    "llama4-scout": _llama4,
    "llama4-maverick": lambda: _llama4(
        num_local_experts=8, interleave_moe_layer_step=2, use_qk_norm=False, rope_parameters=plain_rope(5e5)
    ),
    # what GGUF files are read as having
    "llama4-gguf": lambda: _llama4(num_local_experts=16, attention_chunk_size=8192, floor_scale=8192),
    "llama4-two": lambda: _llama4(num_experts_per_tok=2, moe_layers=[0, 3], attn_temperature_tuning=False),
    "gemma4": _gemma4,
    # of experts that are all chosen, none can be chosen otherwise by llama.cpp's 16-bit table of GELU
    "gemma4-all": lambda: _gemma4(num_experts=4),
    "gemma4-dense": lambda: _gemma4(enable_moe_block=False, attention_k_eq_v=False, final_logit_softcapping=None),
    "mimo": _mimo,
    "step": step3p7.config,
    "hunyuan": _hunyuan,
    "hunyuan-gguf": lambda: _hunyuan(moe_topk=4),
    "afmoe": _afmoe,
    "gpt-oss": _gpt_oss,
    "gpt-oss-gguf": lambda: _gpt_oss(swiglu_limit=7.0),
    "gpt-oss-full": lambda: _gpt_oss(layer_types=["full_attention"] * 3 + ["sliding_attention"]),
    "minimax-m2": _minimax_m2,
    "minimax-m3": minimax_m3.config,
    "minimax-m3-limit": lambda: minimax_m3.limited(),
    "hy3": _hy_v3,
    "olmoe": _olmoe,
    "ernie": _ernie,
    "ernie-some": lambda: _ernie(
        moe_num_shared_experts=0, moe_layer_start_index=0, moe_layer_interval=2, tie_word_embeddings=False
    ),
    "dots1": _dots1,
    "dots1-window": lambda: _dots1(sliding_window=20, max_window_layers=2),
    "solar-open": _solar_open,
    "glm4-lite": _glm4_lite,
    "mistral4": _mistral4,
    "mistral4-groups": lambda: _mistral4(
        n_group=4, topk_group=2, first_k_dense_replace=1, routed_scaling_factor=1.5, norm_topk_prob=False
    ),
    "v3": _v3,
    "v3-half": lambda: _v3(rope_interleave=False),
    "kimi-k2": _kimi_k2,
    "moonlight": _moonlight,
    "v32": _v32,
    "glm-dsa": _glm_dsa,
    "glm-dsa-shared": lambda: _glm_dsa(indexer_types=["full", "shared", "full", "shared"], index_head_dim=20),
    "kimi-linear": _kimi_linear,
    "kimi-linear-wide": lambda: _kimi_linear(
        q_lora_rank=48,
        num_expert_group=4,
        topk_group=2,
        moe_renormalize=False,
        rms_norm_eps=1e-3,
        linear_attn_config={"head_dim": 24, "num_heads": 3, "short_conv_kernel_size": 3},
        num_hidden_layers=5,
    ),
    "qwen4-exp": qwen4_exp.config,
    "v4": deepseek_v4.config,
    "v4-released": lambda: deepseek_v4.config(
        compress_rate_hca=128, num_hash_layers=1, sliding_window=20, max_position_embeddings=512, index_topk=16
    ),
    "glm5-next": glm5_next.config,
    "v2-full": _v2,
    "v2-lite": _v2_lite,
}


def tiny_model(name: str) -> PreTrainedModel:
    """A model of that configuration, float32, every parameter random, norms and biases too."""
    torch.manual_seed(7)
    config = CONFIGS[name]()
    config._attn_implementation = "eager"
    model = untrained(config, dtype=torch.float32).eval()
    for module in model.modules():
        if hasattr(module, "limit") and hasattr(config, "swiglu_limit"):
            module.limit = config.swiglu_limit  # older versions of transformers have it as a constant
    with torch.no_grad():
        for key, value in [*model.named_parameters(), *model.named_buffers()]:
            if not value.is_floating_point():
                continue
            if (value.dim() == 1 or key.endswith("_bias")) and "inv_freq" not in key:
                value.add_(torch.randn_like(value) * (0.2 if "norm" in key else 0.3))
        deepseek_v4.fill(model)
        if config.model_type == "glm5_next_text":
            glm5_next.fill(model)
        qwen4_exp.fill(model)
        if config.model_type == "minimax_m3_vl_text":
            minimax_m3.fill(model)
    return model


def untrained(config: PreTrainedConfig, **options: Any) -> PreTrainedModel:
    """The language model of a configuration."""
    if isinstance(config, Mistral4Config):  # which AutoModelForCausalLM does not know
        return Mistral4ForCausalLM._from_config(config, **options)
    if config.model_type == "step3p5":
        return step3p7.Step3p7ForCausalLM._from_config(config, **options)
    if isinstance(config, Glm5NextTextConfig):
        return glm5_next.Glm5NextForCausalLM._from_config(config, **options)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, **options)
    return model


def save(model: PreTrainedModel, folder: Path) -> Path:
    """The model as transformers writes it: config.json and safetensors with hub names."""
    if model.config.model_type == "deepseek_v4":  # whose names and keys it does not write
        return deepseek_v4.save(model, folder)
    if model.config.model_type == "minimax_m3_vl_text":
        return minimax_m3.save(model, folder)
    if model.config.model_type == "step3p5":  # of which it writes no names of the hub's without the image part
        return step3p7.save(model, folder)
    model.save_pretrained(folder)
    if model.config.model_type == "kimi_linear":
        _dense_as_on_the_hub(folder / "model.safetensors")
    return folder


def _dense_as_on_the_hub(path: Path) -> None:
    """Dense layers of Kimi Linear: transformers writes them under the name that the hub has for experts alone."""
    tensors = {
        re.sub(r"block_sparse_moe\.(?=(?:gate|up|down)_proj)", "mlp.", name): value
        for name, value in load_file(path).items()
    }
    save_file(tensors, path, {"format": "pt"})
