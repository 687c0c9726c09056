"""Tiny models with a layer that predicts further tokens, as hub folders hold it, and transformers' own of it."""

from __future__ import annotations

import copy
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.modeling_layers import MtpModel

from .models import CONFIGS, save, untrained

# where the released checkpoints hold what leads into the layer and out of it: within it, or apart
WITHIN = {"embed": "enorm", "hidden": "hnorm", "project": "eh_proj", "norm": "shared_head.norm"}
NAMES: dict[str, dict[str, str]] = {
    "hy_v3": WITHIN | {"norm": "final_layernorm"},
    "qwen3_next": {
        "embed": "mtp.pre_fc_norm_embedding",
        "hidden": "mtp.pre_fc_norm_hidden",
        "project": "mtp.fc",
        "norm": "mtp.norm",
    },
}
NAMES["qwen3_5_text"] = NAMES["qwen3_5_moe_text"] = NAMES["qwen3_next"]


LISTS = ("layer_types", "mlp_layer_types", "indexer_types")
"""Keys with a word a layer."""


@dataclass(frozen=True)
class Further:
    """The folder, and its tensors by their names there.

    Attributes:
        layers: of the model, without the one that predicts further tokens.
        whole: transformers' model of all layers, the last of which is that one's block.
    """

    folder: Path
    layers: int
    whole: PreTrainedModel
    tensors: dict[str, torch.Tensor]

    def oracle(self) -> tuple[PreTrainedModel, MtpModel]:
        """transformers' own model and its layer for further tokens, read from the folder, where it can."""
        # the class knows the layer by the number that it has in the released model alone
        known = {"_keys_to_ignore_on_load_unexpected": [rf"model\.layers\.{self.layers}.*"]}
        with patch.multiple(type(self.whole), **known):
            model = AutoModelForCausalLM.from_pretrained(self.folder, dtype=torch.float32, attn_implementation="eager")
            return model.eval(), MtpModel.from_pretrained(model).eval()

    @torch.no_grad()
    def normed(self, ids: list[int]) -> torch.Tensor:
        """Last hidden states [T, hidden] of the model behind its norm, by transformers' layers."""
        states: torch.Tensor = self._part(slice(0, self.layers)).model(torch.tensor([ids])).last_hidden_state[0]
        return states

    @torch.no_grad()
    def logits(self, ids: list[int], chained: list[int] | None = None) -> torch.Tensor:
        """Logits [T - 1, vocab] that the layer gives beside tokens 1 and on, by the formula of its paper: for the token
        behind each. With `chained`, [len(chained), vocab] of a chain of drafts behind them."""
        part = self._part(slice(self.layers, None))
        fed, tokens = self.normed(ids)[:-1], ids[1:]
        states = self._states(part, fed, tokens)
        for token in chained or ():
            fed, tokens = torch.cat((fed, states[-1:])), [*tokens, token]
            states = self._states(part, fed, tokens)
        logits: torch.Tensor = part.lm_head(states if chained is None else states[-len(chained) :])
        return logits

    def _states(self, part: PreTrainedModel, fed: torch.Tensor, tokens: list[int]) -> torch.Tensor:
        embedded = part.model.embed_tokens(torch.tensor(tokens))
        both = torch.cat((self._norm("embed")(embedded), self._norm("hidden")(fed)), -1)
        part.model.norm = self._norm("norm")
        x = torch.nn.functional.linear(both, self.tensors[self.name("project")])
        states: torch.Tensor = part.model(inputs_embeds=x[None], use_cache=False).last_hidden_state[0]
        return states

    def name(self, role: str) -> str:
        """The tensor that leads into the layer, or out of it."""
        name = NAMES.get(self.whole.config.model_type, WITHIN)[role] + ".weight"
        return name if name.startswith("mtp.") else f"model.layers.{self.layers}.{name}"

    def _norm(self, role: str) -> Any:
        norm = copy.deepcopy(self.whole.model.norm)
        norm.weight = torch.nn.Parameter(self.tensors[self.name(role)])
        return norm

    def _part(self, layers: slice) -> PreTrainedModel:
        """The model of some layers alone."""
        part = copy.deepcopy(self.whole)
        config = part.model.config
        for key in LISTS:
            if getattr(config, key, None):
                setattr(config, key, getattr(config, key)[layers])
        part.model.layers = part.model.layers[layers]
        config.num_hidden_layers = len(part.model.layers)
        return part


def further_folder(name: str, folder: Path) -> Further:
    """The tiny model `name` of `CONFIGS` whose last layer became the one that predicts further tokens."""
    torch.manual_seed(11)
    config = CONFIGS[name]()
    config._attn_implementation = "eager"
    layers = config.num_hidden_layers
    for key, more in zip(LISTS, ("full_attention", "sparse", "full"), strict=True):
        if getattr(config, key, None):
            setattr(config, key, [*getattr(config, key)[:layers], more])
    config.num_hidden_layers = layers + 1
    whole = untrained(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for key, value in [*whole.named_parameters(), *whole.named_buffers()]:
            if (value.dim() == 1 or key.endswith("_bias")) and "inv_freq" not in key:
                value.add_(torch.randn_like(value) * (0.2 if "norm" in key else 0.3))
    save(whole, folder)
    tensors = _moved(load_file(folder / "model.safetensors"), config, layers)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    _edit(folder, layers)
    return Further(folder, layers, whole, tensors)


def _moved(tensors: dict[str, torch.Tensor], config: Any, layers: int) -> dict[str, torch.Tensor]:
    names = NAMES.get(config.model_type, WITHIN)
    block = f"model.layers.{layers}."
    apart = names["project"].startswith("mtp.")
    out = {}
    for key, value in tensors.items():
        out[key.replace(block, "mtp.layers.0.") if apart else key] = value
    size = config.hidden_size
    zero_centred = apart
    made = {
        role: torch.randn(size, 2 * size) * 0.1
        if role == "project"
        else torch.randn(size) * 0.2 + (0.0 if zero_centred else 1.0)
        for role in names
    }
    for role, name in names.items():
        out[(name if apart else block + name) + ".weight"] = made[role]
    if not apart:  # as released: copies
        out[f"{block}embed_tokens.weight"] = out["model.embed_tokens.weight"].clone()
        out[f"{block}shared_head.head.weight"] = out["lm_head.weight"].clone()
    return out


def _edit(folder: Path, layers: int) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config["num_hidden_layers"] = layers
    for key in LISTS:
        if config.get(key):
            config[key] = config[key][:layers]
    config.pop("num_mtp_layers", None)
    config["num_nextn_predict_layers"] = 1
    path.write_text(json.dumps(config))
