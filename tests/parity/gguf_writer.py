"""Writes a transformers model as GGUF the way converters do: metadata, names from the gguf package, and the
transformations on the way (permuted q and k, stacked experts, split and transposed latent projections)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Literal

import gguf
import numpy as np
import torch
from transformers import PreTrainedConfig, PreTrainedModel

from . import gguf_deepseek_v4, gguf_hybrids, gguf_windows, glm5_next, minimax_m3

Layout = Literal["split", "fused", "both"]
"""Of latent attention: k_b and v_b (new files), kv_b (old files), all three with the split ones folded to 2-D."""

IN_32_BITS = ("_norm.", "ffn_gate_inp", "ssm_conv1d", "hc_attn_", "hc_ffn_", "indexer_compressor_")
"""Matrices that converters keep in float32."""
ARCHITECTURES = {
    "llama": gguf.MODEL_ARCH.LLAMA,
    "mistral": gguf.MODEL_ARCH.LLAMA,
    "qwen2": gguf.MODEL_ARCH.QWEN2,
    "qwen3": gguf.MODEL_ARCH.QWEN3,
    "qwen3_moe": gguf.MODEL_ARCH.QWEN3MOE,
    "glm4": gguf.MODEL_ARCH.GLM4,
    "mixtral": gguf.MODEL_ARCH.LLAMA,
    "qwen2_moe": gguf.MODEL_ARCH.QWEN2MOE,
    "glm4_moe": gguf.MODEL_ARCH.GLM4_MOE,
    "deepseek_v2": gguf.MODEL_ARCH.DEEPSEEK2,
    "deepseek_v3": gguf.MODEL_ARCH.DEEPSEEK2,
    "glm4_moe_lite": gguf.MODEL_ARCH.DEEPSEEK2,
    "mistral4": gguf.MODEL_ARCH.MISTRAL4,
    "minimax_m2": gguf.MODEL_ARCH.MINIMAXM2,
    "minimax_m3_vl_text": gguf.MODEL_ARCH.MINIMAXM2,
    "olmoe": gguf.MODEL_ARCH.OLMOE,
    "ernie4_5_moe": gguf.MODEL_ARCH.ERNIE4_5_MOE,
    "dots1": gguf.MODEL_ARCH.DOTS1,
    "hy_v3": gguf.MODEL_ARCH.DOTS1,  # which has the same tensors; the gguf package does not know it
    "kimi_linear": gguf.MODEL_ARCH.KIMI_LINEAR,
    "glm5_next_text": gguf.MODEL_ARCH.KIMI_LINEAR,  # whose tensors it has, beside those of GLM-5 and DeepSeek-V4
    "deepseek_v32": gguf.MODEL_ARCH.GLM_DSA,
    "glm_moe_dsa": gguf.MODEL_ARCH.GLM_DSA,
    **gguf_hybrids.ARCHITECTURES,
    **gguf_windows.ARCHITECTURES,
}


NAMES = {
    "deepseek_v32": "deepseek32",
    "hy_v3": "hy_v3",
    "glm5_next_text": "glm5-next",
    "qwen4_exp_text": "qwen4exp",
    "minimax_m3_vl_text": "minimax-m3",
}
"""Of architectures that the gguf package does not know; their tensors have the names of the one above."""
DELTA = ("kimi_linear", "glm5_next_text")
STORED = ("blk.", "output_hc_", "per_layer_token_embd.")
"""Beginnings of names that are GGUF's already."""
WITH_PREDICTION = ("glm4_moe", "glm_moe_dsa")


def write_gguf(
    model: PreTrainedModel,
    path: Path,
    layout: Layout = "split",
    *,
    half: bool = False,
    fuse_qkv: bool = False,
    fuse_gate_up: bool = False,
    unstack_experts: bool = False,
    no_vocabulary: bool = False,
    sharing_unsaid: bool = False,
) -> Path:
    """The model as one float32 GGUF file.

    Args:
        half: what converters leave in 16 bits is float16, and the file has the keys of one without a vocabulary.
        fuse_qkv: q, k and v as one tensor.
        fuse_gate_up: the experts' gate and up as one tensor.
        unstack_experts: a tensor an expert, as in Mixtral's first files.
        no_vocabulary: the file has the keys of one without a vocabulary, as with `half`.
        sharing_unsaid: which layers share an indexer is not said, as in files from before that key.
    """
    config = model.config
    if config.model_type == "deepseek_v4":
        return gguf_deepseek_v4.write(model, path, half, no_vocabulary)
    arch = ARCHITECTURES[config.model_type]
    writer = gguf.GGUFWriter(path, NAMES.get(config.model_type, gguf.MODEL_ARCH_NAMES[arch]))
    _common(writer, config)
    by_layer = config.model_type in gguf_windows.ARCHITECTURES
    if by_layer:
        gguf_windows.add_keys(writer, config)
    elif hasattr(config, "rope_parameters"):
        _rope(writer, config)
    if hasattr(config, "kv_lora_rank"):
        _latent(writer, config, layout)
        if hasattr(config, "indexer_types") and not sharing_unsaid:
            _sharing(writer, config)
    elif not by_layer:
        _grouped(writer, config)
    if config.model_type in gguf_hybrids.ARCHITECTURES:
        gguf_hybrids.add_keys(writer, config)
    elif hasattr(config, "num_experts_per_tok") and not by_layer:
        _experts(writer, config)
    tensors = dict(_tensors(model, arch, layout))
    if fuse_qkv:
        tensors = dict(_fused_qkv(tensors))
    if fuse_gate_up:
        tensors = dict(_fused_gate_up(tensors))
    if unstack_experts:
        tensors = dict(_unstacked(tensors))
    if half or no_vocabulary:
        writer.add_vocab_size(config.vocab_size)
        writer.add_tokenizer_model("no_vocab")
    for name, value in tensors.items():
        small = half and value.dim() > 1 and name.endswith(".weight") and not any(part in name for part in IN_32_BITS)
        writer.add_tensor(name, value.detach().numpy().astype(np.float16 if small else np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _common(w: gguf.GGUFWriter, c: PreTrainedConfig) -> None:
    # GLM's prediction layer counts as a block
    nextn = 1 if c.model_type in WITH_PREDICTION else 0
    w.add_block_count(c.num_hidden_layers + nextn)
    if nextn:
        w.add_nextn_predict_layers(nextn)
    w.add_context_length(c.max_position_embeddings)
    w.add_embedding_length(c.hidden_size)
    if not hasattr(c, "shared_expert_intermediate_size") or hasattr(c, "intermediate_size"):
        w.add_feed_forward_length(
            getattr(c, "intermediate_size_mlp", None)
            or getattr(c, "dense_intermediate_size", None)
            or c.intermediate_size
        )
    if c.model_type != "step3p5":  # has other numbers in other layers
        w.add_head_count(c.num_attention_heads)
    w.add_layer_norm_rms_eps(c.rms_norm_eps)


def _grouped(w: gguf.GGUFWriter, c: PreTrainedConfig) -> None:
    w.add_head_count_kv(c.num_key_value_heads)
    head_dim = getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads
    if head_dim != c.hidden_size // c.num_attention_heads:  # converters leave it out where it follows
        w.add_key_length(head_dim)
        w.add_value_length(head_dim)
    w.add_rope_dimension_count(int(head_dim * c.rope_parameters.get("partial_rotary_factor", 1.0)))


def _latent(w: gguf.GGUFWriter, c: PreTrainedConfig, layout: Layout) -> None:
    key = c.qk_nope_head_dim + c.qk_rope_head_dim
    hybrid = hasattr(c, "linear_num_heads")
    if layout == "split":
        if not hybrid:
            w.add_head_count_kv(1)
        w.add_key_length(c.kv_lora_rank + c.qk_rope_head_dim)
        w.add_value_length(c.kv_lora_rank)
        w.add_key_length_mla(key)
        w.add_value_length_mla(c.v_head_dim)
    else:
        if not hybrid:
            w.add_head_count_kv(c.num_attention_heads)
        w.add_key_length(key)
        w.add_value_length(c.v_head_dim)
    w.add_rope_dimension_count(c.qk_rope_head_dim)
    w.add_kv_lora_rank(c.kv_lora_rank)
    if c.q_lora_rank is not None:
        w.add_q_lora_rank(c.q_lora_rank)
    if hasattr(c, "index_topk"):
        w.add_indexer_head_count(c.index_n_heads)
        w.add_indexer_key_length(c.index_head_dim)
        w.add_indexer_top_k(c.index_topk)
    if hasattr(c, "linear_num_heads"):
        # no key heads: a layer of delta attention
        w.add_head_count_kv([int(kind != "linear_attention") for kind in c.layer_types])
        w.add_ssm_conv_kernel(c.linear_conv_kernel_dim)
        w.add_kda_head_dim(c.linear_head_dim)
    if c.model_type == "glm5_next_text":
        glm5_next.add_keys(w, c)
    _deepseek_experts(w, c)


def _sharing(w: gguf.GGUFWriter, c: PreTrainedConfig) -> None:
    w.add_array(f"{w.arch}.attention.indexer.types", [kind == "full" for kind in c.indexer_types])


def _leading_dense(c: PreTrainedConfig) -> int:
    said = getattr(c, "first_k_dense_replace", None)
    return int((getattr(c, "mlp_layer_types", None) or ["dense"]).count("dense") if said is None else said)


def _deepseek_experts(w: gguf.GGUFWriter, c: PreTrainedConfig) -> None:
    w.add_leading_dense_block_count(_leading_dense(c))
    w.add_expert_shared_count(c.n_shared_experts)
    if c.model_type != "deepseek_v2":
        w.add_expert_weights_norm(c.norm_topk_prob)
    # written from a key that these configurations do not have
    if c.model_type not in ("deepseek_v2", "glm4_moe_lite", "mistral4", "glm5_next_text"):
        w.add_expert_gating_func(gguf.ExpertGatingFuncType.SIGMOID)
    if c.n_group:
        w.add_expert_group_count(c.n_group)
        w.add_expert_group_used_count(c.topk_group)
    if c.routed_scaling_factor != 1.0:
        w.add_expert_weights_scale(c.routed_scaling_factor)


def _experts(w: gguf.GGUFWriter, c: PreTrainedConfig) -> None:
    w.add_expert_count(c.num_local_experts if hasattr(c, "num_local_experts") else c.num_experts)
    w.add_expert_used_count(c.num_experts_per_tok)
    if c.model_type == "hy_v3":
        w.add_expert_gating_func(gguf.ExpertGatingFuncType.SIGMOID)
        w.add_expert_feed_forward_length(c.moe_intermediate_size)
        w.add_expert_shared_feed_forward_length(c.moe_intermediate_size * c.num_shared_experts)
        w.add_expert_weights_norm(True)
        w.add_expert_weights_scale(c.router_scaling_factor)
    elif c.model_type == "minimax_m3_vl_text":
        minimax_m3.add_keys(w, c)
    elif c.model_type == "minimax_m2":
        w.add_expert_gating_func(gguf.ExpertGatingFuncType.SIGMOID)
        w.add_expert_feed_forward_length(c.intermediate_size)
    elif c.model_type not in ("mixtral", "olmoe"):
        w.add_expert_feed_forward_length(c.moe_intermediate_size)
    if c.model_type == "ernie4_5_moe":
        w.add_interleave_moe_layer_step(c.moe_layer_interval)
        w.add_leading_dense_block_count(c.moe_layer_start_index)
        w.add_expert_shared_count(c.moe_num_shared_experts)
        w.add_expert_shared_feed_forward_length(c.intermediate_size // c.num_key_value_heads)
    if hasattr(c, "shared_expert_intermediate_size"):
        w.add_expert_shared_feed_forward_length(c.shared_expert_intermediate_size)
    if c.model_type in ("glm4_moe", "dots1"):
        _deepseek_experts(w, c)


def _rope(w: gguf.GGUFWriter, c: PreTrainedConfig) -> None:
    p = c.rope_parameters
    w.add_rope_freq_base(p["rope_theta"])
    if p["rope_type"] == "linear":
        w.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        w.add_rope_scaling_factor(p["factor"])
    elif p["rope_type"] == "yarn":
        w.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        w.add_rope_scaling_factor(p["factor"])
        w.add_rope_scaling_orig_ctx_len(p["original_max_position_embeddings"])
        w.add_rope_scaling_yarn_beta_fast(p["beta_fast"])
        w.add_rope_scaling_yarn_beta_slow(p["beta_slow"])
        if p.get("mscale_all_dim"):
            w.add_rope_scaling_yarn_log_mul(0.1 * p["mscale_all_dim"])


def _tensors(model: PreTrainedModel, arch: gguf.MODEL_ARCH, layout: Layout) -> Iterator[tuple[str, torch.Tensor]]:
    c = model.config
    yield from gguf_windows.extra_tensors(c)
    known = (arch, gguf.MODEL_ARCH.LLAMA, gguf.MODEL_ARCH.GLM_DSA)
    maps = [gguf.get_tensor_name_map(a, c.num_hidden_layers) for a in known]
    if hasattr(c, "rope_parameters") and c.rope_parameters.get("rope_type") == "llama3":
        theta, d = c.rope_parameters["rope_theta"], c.head_dim
        yield "rope_freqs.weight", theta ** -(torch.arange(0, d, 2) / d) / model.model.rotary_emb.inv_freq
    for name, value in model.state_dict().items():
        if name == "lm_head.weight" and c.tie_word_embeddings:
            continue
        for hf, out in _converted(c, name, value, layout):
            if hf.startswith(STORED):
                yield hf, out
                continue
            names = (m.get_name(hf, try_suffixes=(".weight", ".bias")) for m in maps)
            found = next(n for n in names if n) if hf.startswith(("model.", "lm_head.")) else hf
            yield found.replace("exp_probs_b.bias", "exp_probs_b") if c.model_type == "hy_v3" else found, out
    if c.model_type in WITH_PREDICTION:  # of the prediction layer, which is not run
        yield f"blk.{c.num_hidden_layers}.nextn.enorm.weight", torch.ones(c.hidden_size)


def _fused_qkv(tensors: Mapping[str, torch.Tensor]) -> Iterator[tuple[str, torch.Tensor]]:
    for name, value in tensors.items():
        if ".attn_q." in name:
            yield name.replace("_q.", "_qkv."), torch.cat([tensors[name.replace("_q.", f"_{r}.")] for r in "qkv"])
        elif ".attn_k." not in name and ".attn_v." not in name:
            yield name, value


def _fused_gate_up(tensors: Mapping[str, torch.Tensor]) -> Iterator[tuple[str, torch.Tensor]]:
    for name, value in tensors.items():
        if "_gate_exps." in name:
            up = tensors[name.replace("_gate_", "_up_")]
            yield name.replace("_gate_", "_gate_up_"), torch.cat((value, up), 1)
        elif "_up_exps." not in name:
            yield name, value


def _unstacked(tensors: Mapping[str, torch.Tensor]) -> Iterator[tuple[str, torch.Tensor]]:
    for name, value in tensors.items():
        if "_exps." not in name:
            yield name, value
            continue
        for e, expert in enumerate(value):
            yield name.replace("_exps.", f".{e}."), expert


def _converted(
    c: PreTrainedConfig, name: str, value: torch.Tensor, layout: Layout
) -> Iterator[tuple[str, torch.Tensor]]:
    if c.model_type == "minimax_m3_vl_text":
        yield from minimax_m3.converted(c, name, value)
    elif c.model_type in gguf_hybrids.ARCHITECTURES:
        yield from gguf_hybrids.converted(c, name, value)
    elif c.model_type in gguf_windows.ARCHITECTURES:
        yield from gguf_windows.converted(c, name, value)
    elif c.model_type in ("llama", "mistral", "mixtral") and (".q_proj." in name or ".k_proj." in name):
        heads = c.num_attention_heads if ".q_proj." in name else c.num_key_value_heads
        yield (
            name,
            value.view(heads, 2, value.shape[0] // heads // 2, *value.shape[1:]).transpose(1, 2).reshape(value.shape),
        )
    elif "_hc." in name:
        yield glm5_next.gguf_name(name), value
    elif name.endswith("experts.gate_up_proj"):
        stem, half = name.removesuffix("gate_up_proj"), value.shape[1] // 2
        yield f"{stem}gate_proj.weight", value[:, :half]
        yield f"{stem}up_proj.weight", value[:, half:]
    elif name.endswith("shared_expert_gate.weight"):
        yield name, value[0]
    elif name.endswith("experts.down_proj"):
        yield f"{name}.weight", value
    elif ".self_attn." in name and c.model_type in DELTA and not name.endswith("kv_b_proj.weight"):
        yield from _delta(name.replace("forget_gate.", ""), value)
    elif name.endswith("kv_b_proj.weight"):
        yield from _up_projections(c, name, value, layout)
    elif name.endswith("moe_statics.e_score_correction_bias"):
        yield name.replace("gate.moe_statics", "moe_statics").replace("correction_bias", "correction.bias"), value[0]
    elif name.endswith("mlp.e_score_correction_bias"):
        yield name.replace("mlp.", "mlp.gate.").replace("correction_bias", "correction.bias"), value
    else:
        yield name.replace("e_score_correction_bias", "e_score_correction.bias"), value


def _delta(name: str, value: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    """Kimi delta attention: convolutions apart, with axes of 1 before and between; the rates themselves."""
    if "kpool_compress" in name:
        yield glm5_next.gguf_name(name), value
    elif name.endswith("conv1d.weight"):
        for role, part in zip("qkv", value.chunk(3), strict=True):
            yield name.replace("conv1d", f"{role}_conv1d"), part[None]
    elif name.endswith("A_log"):
        yield name, -value.exp()
    else:
        yield name.replace("dt_bias", "dt_proj.bias"), value


def _up_projections(
    c: PreTrainedConfig, name: str, value: torch.Tensor, layout: Layout
) -> Iterator[tuple[str, torch.Tensor]]:
    if layout != "split":
        yield name, value
    if layout != "fused":
        heads = value.view(c.num_attention_heads, c.qk_nope_head_dim + c.v_head_dim, c.kv_lora_rank)
        k, v = heads.split((c.qk_nope_head_dim, c.v_head_dim), 1)
        k = k.transpose(1, 2)
        yield name.replace("kv_b", "k_b"), k if layout == "split" else k.flatten(0, 1)
        yield name.replace("kv_b", "v_b"), v if layout == "split" else v.flatten(0, 1)
