"""What converters to GGUF write of families whose layers differ: with windows or not, in heads, widths, bases."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import gguf
import torch
from transformers import PreTrainedConfig

ARCHITECTURES = {"gemma4_text": gguf.MODEL_ARCH.GEMMA4, "mimo_v2_flash": gguf.MODEL_ARCH.MIMO2}
Tensors = Iterator[tuple[str, torch.Tensor]]
SLIDING, FULL = "sliding_attention", "full_attention"


def add_keys(w: gguf.GGUFWriter, c: PreTrainedConfig) -> None:
    """The keys beyond those that all files have."""
    {"gemma4_text": _gemma4_keys, "mimo_v2_flash": _mimo_keys}[c.model_type](w, c)


def extra_tensors(c: PreTrainedConfig) -> Tensors:
    """Tensors that come from no parameter."""
    if c.model_type == "gemma4_text":
        dim = c.per_layer_config[FULL].head_dim
        turning = int(dim * c.rope_parameters[FULL]["partial_rotary_factor"] / 2)
        yield "rope_freqs.weight", torch.tensor([1.0] * turning + [1e30] * (dim // 2 - turning))


def converted(c: PreTrainedConfig, name: str, value: torch.Tensor) -> Tensors:
    """Tensors as they are stored, under names that the gguf package's tables know, or GGUF's own."""
    convert: dict[str, Callable[[str, torch.Tensor], Tensors]] = {"gemma4_text": _gemma4, "mimo_v2_flash": _experts}
    yield from convert[c.model_type](name, value)


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
        yield name.replace("e_score_correction_bias", "e_score_correction.bias"), value
