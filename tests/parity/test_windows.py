"""Which layers a sliding window is for: as transformers' class of each family reads the same config.json."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import ktcore

SIZES: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "intermediate_size": 48,
    "head_dim": 16,
    "max_position_embeddings": 128,
    "initializer_range": 0.3,
}
EXPERTS = {"moe_intermediate_size": 32, "num_experts": 4, "num_experts_per_tok": 2, "norm_topk_prob": True}
ON = {"use_sliding_window": True, "sliding_window": 9}
GONE = object()
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama: a key left behind": ("Llama", {"sliding_window": 9}),
    "mistral: no switch": ("Mistral", {"sliding_window": 9, "use_sliding_window": False}),
    "mistral: null": ("Mistral", {"sliding_window": None}),
    "qwen2: off": ("Qwen2", {"sliding_window": 9, "use_sliding_window": False, "layer_types": GONE}),
    "qwen2: from a layer on": ("Qwen2", {**ON, "max_window_layers": 2, "layer_types": GONE}),
    "qwen2: from the 28th on where none is named": ("Qwen2", {**ON, "max_window_layers": GONE, "layer_types": GONE}),
    "qwen3: by kinds": ("Qwen3", {**ON, "layer_types": ["full_attention", "sliding_attention", "full_attention"]}),
    "qwen3-moe: every layer": ("Qwen3Moe", {**ON, "max_window_layers": 2}),
}


@pytest.mark.parametrize("name", CASES)
def test_a_window_is_for_the_layers_that_transformers_gives_it(name: str, tmp_path: Path) -> None:
    family, changes = CASES[name]
    config = getattr(transformers, f"{family}Config")(**SIZES, **(EXPERTS if family == "Qwen3Moe" else {}))
    torch.manual_seed(3)
    transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    kept = {key: value for key, value in (json.loads(path.read_text()) | changes).items() if value is not GONE}
    path.write_text(json.dumps(kept))
    ids = torch.randint(0, 96, (40,), generator=torch.Generator().manual_seed(5)).tolist()
    stock = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, dtype=torch.float32, attn_implementation="eager"
    )
    with torch.no_grad():
        want = stock.eval()(torch.tensor([ids])).logits[0]
    with ktcore.load(tmp_path, backend="cpu", rules="reference", context=128) as model:
        got = model.logits(ids)
    assert (got - want).abs().max() < 1e-4
