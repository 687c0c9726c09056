"""Models as they are on the hub: the language model as a part of a larger one, with a prefix on all names."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from ktcore.errors import ArchitectureError
from ktcore.graph import build_graph
from ktcore.graph.complete import left_out
from ktcore.weights import open_checkpoint
from ktcore.weights.bare import BareCheckpoint

from .conftest import Tiny
from .driver import Runner
from .test_quantized import folders

pytestmark = pytest.mark.usefixtures("one_thread")
LLAVA = ("language_model.model.", "language_model.lm_head.")
QWEN = ("model.language_model.", "lm_head.")
# model_type, tiny model, what stands for "model." and "lm_head.", a tensor of each part that is left out
WRAPPED: dict[str, tuple[str, tuple[str, str], tuple[str, ...]]] = {
    "llama4": ("llama4-scout", LLAVA, ("vision_model.class_embedding", "multi_modal_projector.linear_1.weight")),
    "kimi_k25": ("kimi-k2", LLAVA, ("vision_tower.patch_embed.proj.weight", "mm_projector.proj.0.weight")),
    "gemma4": ("gemma4", QWEN, ("model.vision_tower.std_bias", "model.embed_vision.embedding_projection.weight")),
    "step3p7": ("step", ("model.", "lm_head."), ("vision_model.ln_pre.weight", "vit_large_projector.weight")),
    "mistral3": ("mistral4", LLAVA, ("vision_tower.ln_pre.weight", "multi_modal_projector.norm.weight")),
    "glm5_next": ("glm5-next", QWEN, ("model.visual.pos_embed.weight", "model.language_model.layers.6.eh_proj.weight")),
    "qwen3_5": ("qwen3.5", QWEN, ("model.visual.pos_embed.weight", "mtp.fc.weight")),
    "qwen3_5_moe": ("qwen3.5-moe", QWEN, ("model.visual.pos_embed.weight", "mtp.layers.0.mlp.gate.weight")),
    "minimax_m3_vl": ("minimax-m3", LLAVA, ("vision_tower.pre_layrnorm.weight", "patch_merge_mlp.linear_1.weight")),
    "qwen4_exp": ("qwen4-exp", QWEN, ("model.visual.pos_embed.weight", "mtp.layers.0.mlp.gate.weight")),
}


def _config(model_type: str, t: Tiny) -> dict[str, Any]:
    text = json.loads(json.dumps(t.model.config.to_dict()))
    return {"model_type": model_type, "text_config": text, "vision_config": {"hidden_size": 8}}


def _renamed(model_type: str, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    model, head = WRAPPED[model_type][1]
    return {
        name.replace("lm_head.", head, 1) if name.startswith("lm_head.") else name.replace("model.", model, 1): value
        for name, value in tensors.items()
    }


def _folder(model_type: str, t: Tiny, folder: Path, **more: torch.Tensor) -> Path:
    (folder / "config.json").write_text(json.dumps(_config(model_type, t)))
    parts = WRAPPED[model_type][2]
    tied = t.model.config.tie_word_embeddings
    # of the hub's names that transformers writes and has no others for
    found = (
        load_file(t.folder / "model.safetensors") if model_type in ("glm5_next", "step3p7") else t.model.state_dict()
    )
    stored = {k: v for k, v in found.items() if k != "lm_head.weight" or not tied}
    tensors = _renamed(model_type, stored)
    tensors |= {name: torch.zeros(8) for name in parts} | more
    save_file({name: value.clone() for name, value in tensors.items()}, folder / "model.safetensors")
    return folder


@pytest.mark.parametrize("model_type", WRAPPED)
def test_the_language_model_is_read_and_the_rest_is_named(
    model_type: str, tiny: Callable[[str], Tiny], tmp_path: Path
) -> None:
    t = tiny(WRAPPED[model_type][0])
    with open_checkpoint(_folder(model_type, t, tmp_path)) as checkpoint:
        run = Runner(checkpoint)
        torch.testing.assert_close(run(t.ids), t.logits, atol=1e-4, rtol=0)
        assert sum(left_out(checkpoint, run.graph).values()) == len(WRAPPED[model_type][2])


@pytest.mark.parametrize("stray", ["audio_tower.conv.weight", "{}extra.weight", "{}layers.0.self_attn.sinks"])
@pytest.mark.parametrize("model_type", WRAPPED)
def test_a_tensor_of_no_known_part_is_refused(
    model_type: str, stray: str, tiny: Callable[[str], Tiny], tmp_path: Path
) -> None:
    name, (model, _), _ = WRAPPED[model_type]
    stray = stray.format(model)
    folder = _folder(model_type, tiny(name), tmp_path, **{stray: torch.zeros(8)})
    with open_checkpoint(folder) as checkpoint, pytest.raises(ArchitectureError, match=f"nothing uses tensors {stray}"):
        build_graph(checkpoint)


@pytest.mark.parametrize(
    ("outside", "inside", "tied"),
    [(True, False, True), (False, True, False), (None, True, True), (None, False, False), (None, None, False)],
)
def test_the_outer_key_says_first_whether_embeddings_are_tied(
    outside: bool | None, inside: bool | None, tied: bool, tiny: Callable[[str], Tiny]
) -> None:
    config = _config("qwen3_5_moe", tiny("qwen3.5-moe"))
    config["text_config"].pop("tie_word_embeddings")
    for place, value in ((config, outside), (config["text_config"], inside)):
        if value is not None:
            place["tie_word_embeddings"] = value
    graph = build_graph(BareCheckpoint(Path("config.json"), config))
    assert (graph.head.weights["weight"] == graph.embed.weights["weight"]) == tied


def test_a_head_of_its_own_counts_beside_embeddings_that_are_said_to_be_tied(
    tiny: Callable[[str], Tiny], tmp_path: Path
) -> None:
    t = tiny("qwen3.5")
    folder = _folder("qwen3_5", t, tmp_path)
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"tie_word_embeddings": True}))
    with open_checkpoint(folder) as checkpoint:
        torch.testing.assert_close(Runner(checkpoint)(t.ids), t.logits, atol=1e-4, rtol=0)


def test_kimi_k25_has_routed_experts_of_4_bits_and_says_so_inside(tiny: Callable[[str], Tiny], tmp_path: Path) -> None:
    t = tiny("kimi-k2")
    quantised, plain = folders("compressed", t.folder, tmp_path, ".experts.")
    model = AutoModelForCausalLM.from_pretrained(plain, dtype=torch.float32, attn_implementation="eager").eval()
    with torch.no_grad():
        want = model(t.ids[None]).logits[0]
    text = json.loads((quantised / "config.json").read_text()) | {"model_type": "kimi_k2"}
    text["quantization_config"]["ignore"] = ["re:.*self_attn.*", "re:.*shared_experts.*", "re:.*lm_head"]
    config = {"model_type": "kimi_k25", "text_config": text, "tie_word_embeddings": False}
    (quantised / "config.json").write_text(json.dumps(config))
    tensors = _renamed("kimi_k25", load_file(quantised / "model.safetensors"))
    save_file(tensors, quantised / "model.safetensors")
    with open_checkpoint(quantised) as checkpoint:
        run = Runner(checkpoint)
        assert run.graph.node("layers.1.ffn.experts").spec.formats() == ("INT4_G32",)
        torch.testing.assert_close(run(t.ids), want, atol=1e-4, rtol=0)
