"""The forms that published checkpoints have and transformers does not write: old keys, other names, extra layers."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from ktcore.weights import open_checkpoint

from .conftest import Tiny
from .driver import Runner

pytestmark = pytest.mark.usefixtures("one_thread")
TOLERANCE = 1e-4
# model_type as published, where transformers does not know it; keys whose names changed
PUBLISHED: dict[str, dict[str, Any]] = {
    "llama": {},
    "glm4": {},
    "mixtral": {},
    "qwen2-moe": {"mlp_only_layers": [], "decoder_sparse_step": 1, "sliding_window": 65536, "max_window_layers": 28},
    "qwen3-moe": {"mlp_only_layers": []},
    "minimax-m2": {
        "rotary_dim": 16,
        "partial_rotary_factor": None,
        "scoring_func": "sigmoid",
        "use_qk_norm": True,
        "qk_norm_type": "per_layer",
        "attn_type_list": [1, 1, 1],
        "shared_intermediate_size": 0,
    },
    "hy3": {"first_k_dense_replace": 1, "route_norm": True, "qk_norm": True, "num_nextn_predict_layers": 1},
    "glm4-lite": {"first_k_dense_replace": 1, "topk_method": "noaux_tc", "num_nextn_predict_layers": 1},
    "dots1": {"scoring_func": "noaux_tc"},
    "glm4-moe": {"num_nextn_predict_layers": 1},
    "v2-full": {"scoring_func": "softmax", "moe_layer_freq": 1},
    "v3": {"scoring_func": "sigmoid", "topk_method": "noaux_tc", "num_nextn_predict_layers": 1, "ep_size": 1},
    "kimi-k2": {"model_type": "kimi_k2", "scoring_func": "sigmoid", "topk_method": "noaux_tc", "seq_aux": True},
    "moonlight": {"scoring_func": "sigmoid", "topk_method": "noaux_tc", "num_nextn_predict_layers": 0},
}
DERIVED = {"rope_parameters", "layer_types", "num_mtp_layers", "head_dim", "num_local_experts", "dtype"}
EXPERTS = {"qwen2-moe": "num_experts", "qwen3-moe": "num_experts", "mixtral": "num_local_experts"}
EXPERTS |= {"minimax-m2": "num_local_experts", "hy3": "num_experts"}
PREDICTION = ("eh_proj.weight", "enorm.weight", "shared_head.norm.weight", "self_attn.q_proj.weight", "mlp.gate.weight")


def _published(name: str, config: dict[str, Any]) -> dict[str, Any]:
    """config.json of transformers 5 as its makers wrote it."""
    rope = dict(config["rope_parameters"])
    kept = {key: value for key, value in config.items() if key not in DERIVED}
    kept["rope_theta"] = rope.pop("rope_theta")
    if "partial_rotary_factor" in rope:
        kept["partial_rotary_factor"] = rope.pop("partial_rotary_factor")
    # "type" is the older name, and what MLA's makers use
    kind = rope.pop("rope_type")
    kept["rope_scaling"] = None if kind == "default" else rope | {"rope_type" if name == "llama" else "type": kind}
    kept["torch_dtype"] = "float32"
    if config.get("head_dim") and "kv_lora_rank" not in config:
        kept["head_dim"] = config["head_dim"]
    if name in EXPERTS:
        kept[EXPERTS[name]] = config.get("num_experts") or config.get("num_local_experts")
    kept |= PUBLISHED[name]
    return {key: value for key, value in kept.items() if key != "partial_rotary_factor" or value is not None}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_forms_are_read(name: str, tiny: Callable[[str], Tiny], tmp_path: Path) -> None:
    t = tiny(name)
    folder = shutil.copytree(t.folder, tmp_path / name)
    config = json.loads((folder / "config.json").read_text())
    published = _published(name, config)
    (folder / "config.json").write_text(json.dumps(published))
    if published.get("num_nextn_predict_layers"):
        tensors = load_file(folder / "model.safetensors")
        layer = config["num_hidden_layers"]
        extra = {f"model.layers.{layer}.{tensor}": torch.ones(64) for tensor in PREDICTION}
        save_file(tensors | extra, folder / "model.safetensors")
    with open_checkpoint(folder) as checkpoint:
        run = Runner(checkpoint)
        assert len(run.graph.layers) == config["num_hidden_layers"]
        torch.testing.assert_close(run(t.ids), t.logits, atol=TOLERANCE, rtol=0)


def test_experts_of_gpt_oss_with_a_tensor_an_expert(tiny: Callable[[str], Tiny], tmp_path: Path) -> None:
    """As llmcompressor writes them: gate's and up's columns apart, matrices as [out, in], a bias an expert."""
    t = tiny("gpt-oss")
    folder = Path(shutil.copytree(t.folder, tmp_path / "m"))
    stored = {}
    for name, value in load_file(folder / "model.safetensors").items():
        if ".experts." not in name:
            stored[name] = value
            continue
        stem, bias = name.removesuffix("_bias"), name.endswith("_bias")
        for e, expert in enumerate(value):
            one = stem.replace(".experts.", f".experts.{e}.") + (".bias" if bias else ".weight")
            each = expert if bias else expert.T
            if "gate_up" in one:
                stored[one.replace("gate_up", "gate")], stored[one.replace("gate_up", "up")] = each[0::2], each[1::2]
            else:
                stored[one] = each
    save_file({name: value.contiguous() for name, value in stored.items()}, folder / "model.safetensors")
    with open_checkpoint(folder) as checkpoint:
        torch.testing.assert_close(Runner(checkpoint)(t.ids), t.logits, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("name", ["smollm2", "qwen3"])
def test_a_head_of_its_own_counts_though_the_configuration_ties_it(
    name: str, tiny: Callable[[str], Tiny], tmp_path: Path
) -> None:
    t = tiny(name)
    folder = Path(shutil.copytree(t.folder, tmp_path / "m"))
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"tie_word_embeddings": True}))
    tensors = load_file(folder / "model.safetensors")
    own = torch.randn(tensors["model.embed_tokens.weight"].shape, generator=torch.Generator().manual_seed(4)) * 0.1
    save_file(tensors | {"lm_head.weight": own}, folder / "model.safetensors", metadata={"format": "pt"})
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    with torch.no_grad():
        want = model(t.ids[None]).logits[0]
    with open_checkpoint(folder) as checkpoint:
        torch.testing.assert_close(Runner(checkpoint)(t.ids), want, atol=TOLERANCE, rtol=0)
    save_file({n: v for n, v in tensors.items() if n != "lm_head.weight"}, folder / "model.safetensors")
    with open_checkpoint(folder) as checkpoint:
        graph = Runner(checkpoint).graph
        assert graph.head.weights["weight"] == graph.embed.weights["weight"]
