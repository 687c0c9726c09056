"""Tiny Step-3.7-Flash: transformers has its text model without a head, and with one only beside an image part."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import PreTrainedModel
from transformers.generation import GenerationMixin
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.models.step3p7.configuration_step3p7 import Step3p7TextConfig
from transformers.models.step3p7.modeling_step3p7 import Step3p7PreTrainedModel, Step3p7TextModel

from ktcore.conformance.levels.tiny_configs import GQA

PUBLISHED = {
    "mlp.gate.weight": "moe.gate.weight",
    "mlp.gate.e_score_correction_bias": "moe.router_bias",
    "mlp.experts.down_proj": "moe.down_proj.weight",
    "mlp.shared_experts.": "share_expert.",
}


class Step3p7ForCausalLM(Step3p7PreTrainedModel, GenerationMixin):
    """The text model and a head."""

    config: Step3p7TextConfig
    base_model_prefix = "model"
    _tied_weights_keys: dict[str, str] = {}  # noqa: RUF012

    def __init__(self, config: Step3p7TextConfig) -> None:
        super().__init__(config)
        self.model = Step3p7TextModel(config)
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


def config(**changes: Any) -> Step3p7TextConfig:
    """As published files say it: layer by layer, with an entry for a layer that predicts further tokens."""
    kinds = ["full_attention", "sliding_attention", "sliding_attention", "full_attention", "sliding_attention"]
    full = [kind == "full_attention" for kind in kinds]
    settings = dict(
        GQA,
        head_dim=32,
        num_hidden_layers=4,
        num_nextn_predict_layers=1,
        layer_types=kinds,
        sliding_window=20,
        attention_other_setting={"attention_type": "sliding_attention", "num_attention_heads": 6, "head_dim": 32},
        moe_layers_enum="1,2,3",
        rope_theta=[5e5 if whole else 1e4 for whole in full],
        partial_rotary_factors=[0.5 if whole else 1.0 for whole in full],
        rope_scaling={
            "rope_type": "llama3",
            "factor": 2.0,
            "original_max_position_embeddings": 64,
            "low_freq_factor": 1.0,
            "high_freq_factor": 32.0,
        },
        # what values of this size reach
        swiglu_limits=[None, None, 0, 0.05, None],
        swiglu_limits_shared=[0.2, None, 0.1, 0, None],
        n_routed_experts=16,
        num_experts_per_tok=4,
        moe_intermediate_size=32,
        share_expert_dim=48,
        intermediate_size=96,
        moe_router_scaling_factor=2.0,
    )
    return Step3p7TextConfig(**(settings | changes))


def save(model: PreTrainedModel, folder: Path) -> Path:
    """With the hub's names: experts stacked, gate and up apart."""
    folder.mkdir(exist_ok=True)
    model.config.save_pretrained(folder)
    tensors = {}
    for name, value in model.state_dict().items():
        if name.endswith("experts.gate_up_proj"):
            stem = name.replace("mlp.experts.gate_up_proj", "moe")
            gate, up = value.chunk(2, 1)
            tensors |= {f"{stem}.gate_proj.weight": gate.contiguous(), f"{stem}.up_proj.weight": up.contiguous()}
            continue
        for ours, theirs in PUBLISHED.items():
            name = name.replace(ours, theirs)
        tensors[name] = value
    save_file(tensors, folder / "model.safetensors")
    return folder
