"""The demo model as transformers runs it: the same dequantised weights in float32, in its own LlamaForCausalLM."""

from __future__ import annotations

from pathlib import Path

import gguf
import torch
from gguf.quants import dequantize
from transformers import LlamaConfig, LlamaForCausalLM

PROMPTS = (
    "The capital of France is",
    "def fibonacci(n):",
    "Once upon a time, in a village by the sea,",
    "The three laws of thermodynamics are",
    "Q: What is 12 times 12?\nA:",
    "In 1969, Neil Armstrong",
    "To bake bread, you need",
    "La vie est",
)


def transformers_model(path: Path) -> LlamaForCausalLM:
    """SmolLM2 from its GGUF file, dequantised by the gguf package, q and k rows put back into Hugging Face's order."""
    reader = gguf.GGUFReader(path)
    stored = {t.name: torch.from_numpy(dequantize(t.data, t.tensor_type).copy()) for t in reader.tensors}
    value = {key: field.contents() for key, field in reader.fields.items() if key.startswith("llama.")}
    heads, kv_heads = value["llama.attention.head_count"], value["llama.attention.head_count_kv"]
    layers = value["llama.block_count"]
    config = LlamaConfig(
        vocab_size=value["llama.vocab_size"],
        hidden_size=value["llama.embedding_length"],
        intermediate_size=value["llama.feed_forward_length"],
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        rms_norm_eps=value["llama.attention.layer_norm_rms_epsilon"],
        rope_theta=value["llama.rope.freq_base"],
        max_position_embeddings=value["llama.context_length"],
        tie_word_embeddings=True,
        eos_token_id=None,
        bos_token_id=None,
        pad_token_id=None,
    )
    # tensors are put in place of random ones, so nothing is initialised
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    state = {
        "model.embed_tokens.weight": stored["token_embd.weight"],
        "lm_head.weight": stored["token_embd.weight"],
        "model.norm.weight": stored["output_norm.weight"],
    }
    for i in range(layers):
        ours, theirs = f"blk.{i}.", f"model.layers.{i}."
        state[theirs + "input_layernorm.weight"] = stored[ours + "attn_norm.weight"]
        state[theirs + "post_attention_layernorm.weight"] = stored[ours + "ffn_norm.weight"]
        state[theirs + "self_attn.q_proj.weight"] = _halves(stored[ours + "attn_q.weight"], heads)
        state[theirs + "self_attn.k_proj.weight"] = _halves(stored[ours + "attn_k.weight"], kv_heads)
        state[theirs + "self_attn.v_proj.weight"] = stored[ours + "attn_v.weight"]
        state[theirs + "self_attn.o_proj.weight"] = stored[ours + "attn_output.weight"]
        for part in ("gate", "up", "down"):
            state[theirs + f"mlp.{part}_proj.weight"] = stored[ours + f"ffn_{part}.weight"]
    model.load_state_dict(state, assign=True)
    # buffers made on the meta device have no values: the rotary table is built anew
    model.model.rotary_emb = type(model.model.rotary_emb)(config)
    return model.float().eval()


def _halves(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows from GGUF's interleaved rotary pairs back to halves."""
    return weight.view(heads, -1, 2, weight.shape[-1]).transpose(1, 2).reshape(weight.shape)
