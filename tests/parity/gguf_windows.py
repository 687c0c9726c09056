"""What converters to GGUF write of families whose layers differ: with windows or not, in heads, widths, bases."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import gguf
import torch
from transformers import PreTrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

ARCHITECTURES = {
    "gemma4_text": gguf.MODEL_ARCH.GEMMA4,
    "mimo_v2_flash": gguf.MODEL_ARCH.MIMO2,
    "step3p5": gguf.MODEL_ARCH.STEP35,
    "hunyuan_v1_moe": gguf.MODEL_ARCH.HUNYUAN_MOE,
    "afmoe": gguf.MODEL_ARCH.AFMOE,
}
Tensors = Iterator[tuple[str, torch.Tensor]]
SLIDING, FULL = "sliding_attention", "full_attention"


def add_keys(w: gguf.GGUFWriter, c: PreTrainedConfig) -> None:
    """The keys beyond those that all files have."""
    write: dict[str, Callable[[gguf.GGUFWriter, PreTrainedConfig], None]] = {
        "gemma4_text": _gemma4_keys,
        "mimo_v2_flash": _mimo_keys,
        "step3p5": _step_keys,
        "hunyuan_v1_moe": _hunyuan_keys,
        "afmoe": _afmoe_keys,
    }
    write[c.model_type](w, c)


def extra_tensors(c: PreTrainedConfig) -> Tensors:
    """Tensors that come from no parameter."""
    if c.model_type == "gemma4_text":
        dim = c.per_layer_config[FULL].head_dim
        turning = int(dim * c.rope_parameters[FULL]["partial_rotary_factor"] / 2)
        yield "rope_freqs.weight", torch.tensor([1.0] * turning + [1e30] * (dim // 2 - turning))

    if c.model_type == "step3p5":
        # the divisors of the layers that turn fewer pairs, and ones behind them
        rope = c.rope_parameters[FULL]
        dim = int(c.head_dim * rope["partial_rotary_factor"])
        plain = rope["rope_theta"] ** -(torch.arange(0, dim, 2) / dim)
        scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](c, layer_type=FULL)
        yield "rope_freqs.weight", torch.cat((plain / scaled, torch.ones((c.head_dim - dim) // 2)))


def converted(c: PreTrainedConfig, name: str, value: torch.Tensor) -> Tensors:
    """Tensors as they are stored, under names that the gguf package's tables know, or GGUF's own."""
    convert: dict[str, Callable[[str, torch.Tensor], Tensors]] = {"gemma4_text": _gemma4, "step3p5": _step}
    yield from convert.get(c.model_type, _experts)(name, value)


def own(c: PreTrainedConfig, layer: int, key: str) -> Any:
    """A setting of one layer."""
    return getattr(c.per_layer_config[layer], key)


def _sliding(c: PreTrainedConfig) -> list[bool]:
    return [kind == SLIDING for kind in c.layer_types]


def _gemma4_keys(w: gguf.GGUFWriter, c: PreTrainedConfig) -> None:
    wide, narrow = c.per_layer_config[FULL], c.per_layer_config[SLIDING]
    w.add_shared_kv_layers(0)
    w.add_embedding_length_per_layer_input(0)
    w.add_sliding_window(c.sliding_window)
    w.add_sliding_window_pattern(_sliding(c))
    w.add_key_length(wide.head_dim)
    w.add_value_length(wide.head_dim)
    w.add_key_length_swa(narrow.head_dim)
    w.add_value_length_swa(narrow.head_dim)
    w.add_head_count_kv([own(c, i, "num_key_value_heads") for i in range(c.num_hidden_layers)])
    w.add_rope_dimension_count(wide.head_dim)
    w.add_rope_dimension_count_swa(narrow.head_dim)
    w.add_rope_freq_base(c.rope_parameters[FULL]["rope_theta"])
    w.add_rope_freq_base_swa(c.rope_parameters[SLIDING]["rope_theta"])
    # llama.cpp takes 30 where a file does not say
    w.add_final_logit_softcapping(c.final_logit_softcapping or 0.0)
    if c.enable_moe_block:
        w.add_expert_count(c.num_experts)
        w.add_expert_used_count(c.top_k_experts)
        w.add_expert_feed_forward_length(c.moe_intermediate_size)


def _gemma4(name: str, value: torch.Tensor) -> Tensors:
    layer = name.split(".")[2]
    if name.endswith("router.scale"):
        yield f"blk.{layer}.ffn_gate_inp.scale", value
    elif name.endswith("per_expert_scale"):
        yield f"blk.{layer}.ffn_down_exps.scale", value
    elif name.endswith(("layer_scalar", "experts.gate_up_proj", "experts.down_proj")):
        yield f"{name}.weight", value
    else:
        yield name, value


def _mimo_keys(w: gguf.GGUFWriter, c: PreTrainedConfig) -> None:
    w.add_sliding_window(c.sliding_window)
    w.add_sliding_window_pattern(_sliding(c))
    w.add_head_count_kv([c.num_key_value_heads * (2 if slides else 1) for slides in _sliding(c)])
    w.add_key_length(c.head_dim)
    w.add_value_length(c.v_head_dim)
    w.add_rope_dimension_count(int(c.head_dim * c.rope_parameters[FULL]["partial_rotary_factor"]))
    w.add_rope_freq_base(c.rope_parameters[FULL]["rope_theta"])
    w.add_rope_freq_base_swa(c.rope_parameters[SLIDING]["rope_theta"])
    w.add_float32(f"{w.arch}.attention.value_scale", c.attention_value_scale)
    w.add_expert_count(c.n_routed_experts)
    w.add_expert_used_count(c.num_experts_per_tok)
    w.add_expert_feed_forward_length(c.moe_intermediate_size)


def _experts(name: str, value: torch.Tensor) -> Tensors:
    if name.endswith("experts.gate_up_proj"):
        gate, up = value.chunk(2, 1)
        yield name.replace("gate_up_proj", "gate_proj.weight"), gate
        yield name.replace("gate_up_proj", "up_proj.weight"), up
    elif name.endswith(("experts.down_proj", ".sinks")):
        yield f"{name}.weight", value
    else:
        yield (
            name.replace("e_score_correction_bias", "e_score_correction.bias").replace(
                "expert_bias", "expert_bias.bias"
            ),
            value,
        )


def _step_keys(w: gguf.GGUFWriter, c: PreTrainedConfig) -> None:
    w.add_head_count([own(c, i, "num_attention_heads") for i in range(c.num_hidden_layers)])
    w.add_head_count_kv([c.num_key_value_heads] * c.num_hidden_layers)
    w.add_sliding_window(c.sliding_window)
    w.add_sliding_window_pattern(_sliding(c))
    w.add_key_length(c.head_dim)
    w.add_value_length(c.head_dim)
    w.add_rope_freq_base(c.rope_parameters[FULL]["rope_theta"])
    w.add_rope_freq_base_swa(c.rope_parameters[SLIDING]["rope_theta"])
    w.add_expert_count(c.n_routed_experts)
    w.add_expert_used_count(c.num_experts_per_tok)
    w.add_expert_feed_forward_length(c.moe_intermediate_size)
    w.add_expert_shared_feed_forward_length(c.share_expert_dim)
    w.add_expert_weights_scale(c.moe_router_scaling_factor)
    w.add_expert_weights_norm(True)
    w.add_leading_dense_block_count(c.mlp_layer_types.index("sparse"))
    w.add_swiglu_clamp_exp([float(limit or 0) for limit in c.swiglu_limits])
    w.add_swiglu_clamp_shexp([float(limit or 0) for limit in c.swiglu_limits_shared])


def _step(name: str, value: torch.Tensor) -> Tensors:
    yield from _experts(name, value + 1 if name.endswith("norm.weight") else value)


def _hunyuan_keys(w: gguf.GGUFWriter, c: PreTrainedConfig) -> None:
    w.add_head_count_kv(c.num_key_value_heads)
    w.add_key_length(c.head_dim)
    w.add_value_length(c.head_dim)
    rope = c.rope_parameters
    w.add_rope_freq_base(rope["rope_theta"] * rope["alpha"] ** (c.head_dim / (c.head_dim - 2)))
    w.add_rope_scaling_type(gguf.RopeScalingType.NONE)
    w.add_expert_count(c.num_experts)
    w.add_expert_used_count(c.moe_topk)
    w.add_expert_feed_forward_length(c.intermediate_size)
    w.add_expert_shared_feed_forward_length(c.intermediate_size)
    w.add_expert_shared_count(1)


def _afmoe_keys(w: gguf.GGUFWriter, c: PreTrainedConfig) -> None:
    w.add_head_count_kv(c.num_key_value_heads)
    w.add_key_length(c.head_dim)
    w.add_value_length(c.head_dim)
    w.add_rope_dimension_count(c.head_dim)
    w.add_rope_freq_base(c.rope_parameters["rope_theta"])
    w.add_sliding_window(c.sliding_window)
    w.add_expert_count(c.num_experts)
    w.add_expert_used_count(c.num_experts_per_tok)
    w.add_expert_shared_count(c.num_shared_experts)
    w.add_expert_feed_forward_length(c.moe_intermediate_size)
    w.add_leading_dense_block_count(c.num_dense_layers)
    w.add_expert_weights_norm(True)
    w.add_expert_weights_scale(c.route_scale)
