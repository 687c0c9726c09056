"""What converters to GGUF do to Qwen3-Next and 3.5, LLaMA 4 and gpt-oss: keys of their own, and changed tensors."""

from __future__ import annotations

from collections.abc import Iterator

import gguf
import torch
from transformers import PreTrainedConfig

from . import qwen4_exp

ARCHITECTURES = {
    "qwen3_next": gguf.MODEL_ARCH.QWEN3NEXT,
    "qwen3_5_text": gguf.MODEL_ARCH.QWEN35,
    "qwen3_5_moe_text": gguf.MODEL_ARCH.QWEN35MOE,
    "qwen4_exp_text": gguf.MODEL_ARCH.QWEN35MOE,
    "llama4_text": gguf.MODEL_ARCH.LLAMA4,
    "gpt_oss": gguf.MODEL_ARCH.GPT_OSS,
}
QWEN = ("qwen3_next", "qwen3_5_text", "qwen3_5_moe_text", "qwen4_exp_text")
Tensors = Iterator[tuple[str, torch.Tensor]]


def add_keys(w: gguf.GGUFWriter, c: PreTrainedConfig) -> None:
    """The keys beyond those that all files with grouped-query attention have."""
    if c.model_type != "qwen3_5_text":
        w.add_expert_count(c.num_experts if c.model_type in QWEN else c.num_local_experts)
        w.add_expert_used_count(c.num_experts_per_tok)
    if c.model_type in QWEN:
        if c.model_type != "qwen3_5_text":
            w.add_expert_feed_forward_length(c.moe_intermediate_size)
            w.add_expert_shared_feed_forward_length(c.shared_expert_intermediate_size)
        if c.model_type != "qwen3_next":
            w.add_rope_dimension_sections([*c.rope_parameters["mrope_section"], 0])
        w.add_ssm_conv_kernel(c.linear_conv_kernel_dim)
        w.add_ssm_state_size(c.linear_key_head_dim)
        w.add_ssm_group_count(c.linear_num_key_heads)
        w.add_ssm_time_step_rank(c.linear_num_value_heads)
        w.add_ssm_inner_size(c.linear_value_head_dim * c.linear_num_value_heads)
        w.add_full_attention_interval(4)
        if c.model_type == "qwen4_exp_text":
            qwen4_exp.add_keys(w, c)
        return
    w.add_expert_feed_forward_length(c.intermediate_size)
    if c.model_type == "gpt_oss":
        w.add_sliding_window(c.sliding_window)
    else:
        w.add_interleave_moe_layer_step(c.interleave_moe_layer_step)


def converted(c: PreTrainedConfig, name: str, value: torch.Tensor) -> Tensors:
    """Tensors as they are stored, under names that the gguf package's tables know."""
    if c.model_type == "qwen4_exp_text" and (own := list(qwen4_exp.converted(c, name, value))):
        yield from (pair for pair in own if pair[0])
        return
    convert = {"qwen3_next": _qwen3_next, "llama4_text": _llama4, "gpt_oss": _gpt_oss}.get(c.model_type, _qwen3_5)
    yield from convert(c, name, value)


def _qwen3_5(c: PreTrainedConfig, name: str, value: torch.Tensor) -> Tensors:
    """Value heads of the same key head lie apart, so that repeating all key heads as a whole gives each its own."""
    keys = 2 * c.linear_num_key_heads * c.linear_key_head_dim
    if "in_proj_qkv." in name or "conv1d." in name:
        value = torch.cat((value[:keys], _tiled(c, value[keys:])))
    elif any(part in name for part in ("in_proj_z.", "in_proj_a.", "in_proj_b.", "A_log", "dt_bias")):
        value = _tiled(c, value)
    elif "linear_attn.out_proj." in name:
        value = _tiled(c, value.T).T.contiguous()
    yield from _qwen3_next(c, name, value)


def _tiled(c: PreTrainedConfig, rows: torch.Tensor) -> torch.Tensor:
    key_heads = c.linear_num_key_heads
    groups = rows.view(key_heads, c.linear_num_value_heads // key_heads, -1, *rows.shape[1:])
    return groups.transpose(0, 1).reshape(rows.shape)


def _qwen3_next(c: PreTrainedConfig, name: str, value: torch.Tensor) -> Tensors:
    if name.endswith("in_proj_qkvz.weight"):
        heads, key, values = c.linear_num_key_heads, c.linear_key_head_dim, c.linear_value_head_dim
        values *= c.linear_num_value_heads // heads
        q, k, v, z = value.view(heads, -1, value.shape[1]).split((key, key, values, values), 1)
        yield name.replace("qkvz", "qkv"), torch.cat([t.flatten(0, 1) for t in (q, k, v)])
        yield name.replace("qkvz", "z"), z.flatten(0, 1)
    elif name.endswith("A_log"):
        yield name, -value.exp()
    elif name.endswith("dt_bias"):
        yield name.replace("dt_bias", "dt_proj.bias"), value
    elif name.endswith("conv1d.weight"):
        yield name, value[:, 0]
    elif name.endswith("norm.weight") and not name.endswith("linear_attn.norm.weight"):
        yield name, value + 1
    elif name.endswith("shared_expert_gate.weight"):
        yield name, value[0]
    elif name.endswith("experts.gate_up_proj"):
        gate, up = value.chunk(2, 1)
        yield name.replace("gate_up_proj", "gate_proj.weight"), gate
        yield name.replace("gate_up_proj", "up_proj.weight"), up
    elif name.endswith("experts.down_proj"):
        yield f"{name}.weight", value
    else:
        yield name, value


def _llama4(c: PreTrainedConfig, name: str, value: torch.Tensor) -> Tensors:
    if name.endswith("experts.gate_up_proj"):
        gate, up = value.transpose(1, 2).chunk(2, 1)
        yield name.replace("gate_up_proj", "gate_proj.weight"), gate
        yield name.replace("gate_up_proj", "up_proj.weight"), up
    elif name.endswith("experts.down_proj"):
        yield f"{name}.weight", value.transpose(1, 2)
    else:
        yield name, value


def _gpt_oss(c: PreTrainedConfig, name: str, value: torch.Tensor) -> Tensors:
    if ".experts." not in name:
        yield (f"{name}.weight" if name.endswith("sinks") else name), value
        return
    ending = ".bias" if name.endswith("_bias") else ".weight"
    stem = name.removesuffix("_bias")
    value = value if ending == ".bias" else value.transpose(1, 2)
    if stem.endswith("gate_up_proj"):
        yield stem.replace("gate_up_proj", "gate_proj") + ending, value[:, ::2]
        yield stem.replace("gate_up_proj", "up_proj") + ending, value[:, 1::2]
    else:
        yield stem + ending, value
