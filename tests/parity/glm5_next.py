"""Tiny GLM-5.3-Flash: transformers has its text model without a head, and with one only beside an image part."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import torch
from transformers import Glm5NextTextConfig, PreTrainedModel
from transformers.generation import GenerationMixin
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.models.glm5_next.modeling_glm5_next import Glm5NextPreTrainedModel, Glm5NextTextModel

from ktcore.conformance.levels.tiny_configs import MLA


class Glm5NextForCausalLM(Glm5NextPreTrainedModel, GenerationMixin):
    """The text model and a head."""

    config: Glm5NextTextConfig
    _tied_weights_keys: dict[str, str] = {}  # noqa: RUF012

    def __init__(self, config: Glm5NextTextConfig) -> None:
        super().__init__(config)
        self.model = Glm5NextTextModel(config)
        self.lm_head = torch.nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def forward(self, input_ids: torch.Tensor | None = None, **more: Any) -> CausalLMOutputWithPast:
        """Logits of all tokens, or of the last `logits_to_keep`."""
        last = more.pop("logits_to_keep", 0)
        found = self.model(input_ids, **{name: value for name, value in more.items() if name != "return_dict"})
        hidden = found.last_hidden_state
        return CausalLMOutputWithPast(
            logits=self.lm_head(hidden[:, -last:] if last else hidden), past_key_values=found.cache
        )


def config(**changes: Any) -> Glm5NextTextConfig:
    """Three kinds of layer; a budget of three pools, which prompts of 96 tokens are longer than."""
    settings = dict(
        MLA,
        q_lora_rank=48,
        qk_rope_head_dim=0,
        num_hidden_layers=6,
        layer_types=["linear_attention", "indexed_attention"] * 3,
        mlp_layer_types=["dense", "dense", *["sparse"] * 4],
        n_routed_experts=16,
        num_experts_per_tok=4,
        n_shared_experts=1,
        routed_scaling_factor=2.5,
        # what values of this size reach
        swiglu_limit=0.3,
        index_topk=12,
        index_kpool=4,
        index_n_heads=16,
        index_head_dim=64,
        # as many as attention has: GGUF has one number
        linear_num_heads=4,
        linear_head_dim=16,
        # the class makes a padding token's embedding zero: all index scores of such a token are equal
        pad_token_id=None,
        rms_norm_eps=1e-3,
    )
    return Glm5NextTextConfig(**(settings | changes))


def fill(model: PreTrainedModel) -> None:
    """Random values where the class begins with zeros or ones: places in pools, rates, gates, streams' weights."""
    for name, value in model.named_parameters():
        if "kpool_compress" in name:
            value.copy_(torch.randn_like(value) * (1.0 if name.endswith("ape") else 0.3))
        elif name.endswith("_hc.fn"):
            value.copy_(torch.randn_like(value) * 0.1)
        elif name.endswith("dt_bias"):
            value.copy_(torch.randn_like(value) - 1.0)  # much of a state is left


def add_keys(w: gguf.GGUFWriter, c: Glm5NextTextConfig) -> None:
    """Keys of GGUF files beyond those of latent attention, its indexer and Kimi Linear."""
    streams = f"{w.arch}.hyper_connection"
    w.add_uint32(f"{streams}.count", c.hc_mult)
    w.add_uint32(f"{streams}.sinkhorn_iterations", c.hc_sinkhorn_iters)
    w.add_float32(f"{streams}.epsilon", c.hc_eps)
    w.add_uint32(f"{w.arch}.attention.indexer.kpool", c.index_kpool)
    w.add_bool(f"{w.arch}.attention.indexer.kpool_select_tail", c.index_kpool_always_select_tail)
    w.add_layer_norm_eps(1e-6)
    if c.linear_lower_bound is not None:
        w.add_float32(f"{w.arch}.kda.gate_lower_bound", c.linear_lower_bound)
    for part in ("exp", "shexp"):
        w.add_array(f"{w.arch}.swiglu_clamp_{part}", [c.swiglu_limit] * c.num_hidden_layers)


def gguf_name(name: str) -> str:
    """Of tensors that the gguf package does not know."""
    layer, part = name.split(".")[2], name.rsplit(".", 1)[-1]
    if "kpool_compress" in name:
        return f"blk.{layer}.indexer_compressor_{part.rsplit('_', 1)[-1]}.weight"
    where = "attn" if ".attn_hc." in name else "ffn"
    return f"blk.{layer}.hc_{where}_{part}.weight"


def save(model: PreTrainedModel, folder: Path) -> Path:
    """As the hub has it but for the image part: transformers writes the names of the hub."""
    model.save_pretrained(folder)
    return folder
