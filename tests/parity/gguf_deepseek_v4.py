"""DeepSeek-V4 as GGUF, with keys and names as llama.cpp's converter writes them; the gguf package lacks them so far."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import gguf
import numpy as np
import torch
from transformers import DeepseekV4Config, PreTrainedModel

from . import deepseek_v4

ARCHITECTURE = "deepseek4"
ROOT_SOFTPLUS = 4  # of `expert_gating_func`
OUTSIDE = {
    "embed.weight": "token_embd.weight",
    "norm.weight": "output_norm.weight",
    "head.weight": "output.weight",
    "hc_head_fn": "output_hc_fn.weight",
    "hc_head_base": "output_hc_base.weight",
    "hc_head_scale": "output_hc_scale.weight",
}
# of the hub's names within a layer; what is in no row keeps its own
LAYER = {
    "attn.attn_sink": "attn_sinks.weight",
    "attn.wq_a": "attn_q_a",
    "attn.wq_b": "attn_q_b",
    "attn.q_norm": "attn_q_a_norm",
    "attn.wkv": "attn_kv",
    "attn.kv_norm": "attn_kv_a_norm",
    "attn.wo_a": "attn_output_a",
    "attn.wo_b": "attn_output_b",
    "attn.compressor.ape": "attn_compressor_ape.weight",
    "attn.compressor.wkv": "attn_compressor_kv",
    "attn.compressor.wgate": "attn_compressor_gate",
    "attn.compressor.norm": "attn_compressor_norm",
    "attn.indexer.wq_b": "indexer.attn_q_b",
    "attn.indexer.weights_proj": "indexer.proj",
    "attn.indexer.compressor.ape": "indexer_compressor_ape.weight",
    "attn.indexer.compressor.wkv": "indexer_compressor_kv",
    "attn.indexer.compressor.wgate": "indexer_compressor_gate",
    "attn.indexer.compressor.norm": "indexer_compressor_norm",
    "ffn.gate.bias": "exp_probs_b.bias",
    "ffn.gate.tid2eid": "ffn_gate_tid2eid.weight",
    "ffn.gate": "ffn_gate_inp",
    "ffn.shared_experts.w1": "ffn_gate_shexp",
    "ffn.shared_experts.w2": "ffn_down_shexp",
    "ffn.shared_experts.w3": "ffn_up_shexp",
    **{
        f"hc_{branch}_{part}": f"hc_{branch}_{part}.weight"
        for branch in ("attn", "ffn")
        for part in ("fn", "base", "scale")
    },
}
EXPERTS = {"w1": "ffn_gate_exps.weight", "w2": "ffn_down_exps.weight", "w3": "ffn_up_exps.weight"}
IN_32_BITS = ("_norm.", "_ape.", "hc_", "ffn_gate_inp.", "indexer.proj.")


def write(model: PreTrainedModel, path: Path, half: bool, no_vocabulary: bool) -> Path:
    """The model as one file; arguments as of `write_gguf`."""
    writer = gguf.GGUFWriter(path, ARCHITECTURE)
    _keys(writer, model.config)  # type: ignore[arg-type]
    if half or no_vocabulary:
        writer.add_vocab_size(model.config.vocab_size)
        writer.add_tokenizer_model("no_vocab")
    for name, value in _tensors(model):
        if value.dtype == torch.int64:
            writer.add_tensor(name, value.numpy().astype(np.int32))
            continue
        small = half and value.dim() > 1 and not any(part in name for part in IN_32_BITS)
        writer.add_tensor(name, value.detach().numpy().astype(np.float16 if small else np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _keys(w: gguf.GGUFWriter, c: DeepseekV4Config) -> None:
    main, compress = c.rope_parameters["main"], c.rope_parameters["compress"]
    ratios = [0 if kind.startswith("sliding") else c.compress_rates[kind] for kind in c.layer_types]
    w.add_block_count(c.num_hidden_layers)
    w.add_context_length(c.max_position_embeddings)
    w.add_embedding_length(c.hidden_size)
    w.add_head_count(c.num_attention_heads)
    w.add_head_count_kv(1)
    w.add_key_length(c.head_dim)
    w.add_value_length(c.head_dim)
    w.add_layer_norm_rms_eps(c.rms_norm_eps)
    w.add_rope_dimension_count(c.qk_rope_head_dim)
    w.add_rope_freq_base(main["rope_theta"])
    w.add_rope_scaling_type(gguf.RopeScalingType.YARN)
    w.add_rope_scaling_factor(compress["factor"])
    w.add_rope_scaling_orig_ctx_len(compress["original_max_position_embeddings"])
    w.add_rope_scaling_yarn_beta_fast(compress.get("beta_fast", 32.0))
    w.add_rope_scaling_yarn_beta_slow(compress.get("beta_slow", 1.0))
    w.add_q_lora_rank(c.q_lora_rank)
    w.add_sliding_window(c.sliding_window)
    w.add_expert_count(c.n_routed_experts)
    w.add_expert_used_count(c.num_experts_per_tok)
    w.add_expert_feed_forward_length(c.moe_intermediate_size)
    w.add_expert_shared_count(c.n_shared_experts)
    w.add_expert_weights_scale(c.routed_scaling_factor)
    w.add_expert_weights_norm(True)
    w.add_uint32(f"{ARCHITECTURE}.expert_gating_func", ROOT_SOFTPLUS)
    w.add_indexer_head_count(c.index_n_heads)
    w.add_indexer_key_length(c.index_head_dim)
    w.add_indexer_top_k(c.index_topk)
    for part in ("exp", "shexp"):
        w.add_array(f"{ARCHITECTURE}.swiglu_clamp_{part}", [c.swiglu_limit] * c.num_hidden_layers)
    w.add_uint32(f"{ARCHITECTURE}.attention.output_group_count", c.o_groups)
    w.add_uint32(f"{ARCHITECTURE}.attention.output_lora_rank", c.o_lora_rank)
    w.add_array(f"{ARCHITECTURE}.attention.compress_ratios", ratios)
    w.add_float32(f"{ARCHITECTURE}.attention.compress_rope_freq_base", compress["rope_theta"])
    w.add_uint32(f"{ARCHITECTURE}.hyper_connection.count", c.hc_mult)
    w.add_uint32(f"{ARCHITECTURE}.hyper_connection.sinkhorn_iterations", c.hc_sinkhorn_iters)
    w.add_float32(f"{ARCHITECTURE}.hyper_connection.epsilon", c.hc_eps)
    w.add_uint32(f"{ARCHITECTURE}.hash_layer_count", c.mlp_layer_types.count("hash_moe"))
    w.add_uint32(f"{ARCHITECTURE}.embedding_length_out", c.hidden_size * c.hc_mult)


def _tensors(model: PreTrainedModel) -> Iterator[tuple[str, torch.Tensor]]:
    stacks: dict[str, list[torch.Tensor]] = {}
    for name, value in deepseek_v4.hub_tensors(model):
        if name.startswith("mtp."):
            continue  # written to a file of their own
        if name in OUTSIDE:
            yield OUTSIDE[name], value
            continue
        layer, rest = re.fullmatch(r"layers\.(\d+)\.(.+)", name).groups()  # type: ignore[union-attr]
        if expert := re.fullmatch(r"ffn\.experts\.\d+\.(w\d)\.weight", rest):
            stacks.setdefault(f"blk.{layer}.{EXPERTS[expert[1]]}", []).append(value)
        elif rest in LAYER:
            yield f"blk.{layer}.{LAYER[rest]}", value
        else:
            stem = rest.removesuffix(".weight")
            yield f"blk.{layer}.{LAYER.get(stem, stem)}.weight", value
    for name, values in stacks.items():
        yield name, torch.stack(values)
