"""Attention and shared parts from one checkpoint, routed experts from another: the logits of such a model."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch
import torch
from transformers import AutoModelForCausalLM

import ktcore
from ktcore.errors import ArchitectureError, KtcoreError
from ktcore.graph.mixed import join_experts
from ktcore.weights import open_checkpoint

from .conftest import Tiny
from .driver import Runner
from .gguf_writer import write_gguf
from .models import CONFIGS, save, tiny_model

pytestmark = pytest.mark.usefixtures("one_thread")
TOLERANCE = 1e-4


def with_other_experts(name: str, path: Path) -> tuple[torch.nn.Module, Path]:
    """The tiny model of that name with other experts, as GGUF."""
    model = tiny_model(name)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for key, value in model.named_parameters():
            if ".experts." in key:
                value.copy_(torch.randn(value.shape, generator=generator) * 0.1)
    return model, write_gguf(model, path)


@pytest.mark.parametrize("name", ["qwen3-moe", "v3", "mixtral"])
def test_experts_come_from_a_gguf_file(name: str, tiny: Callable[[str], Tiny], tmp_path: Path) -> None:
    t = tiny(name)
    other, file = with_other_experts(name, tmp_path / "other.gguf")
    with torch.no_grad():
        expected = other(t.ids[None]).logits[0]  # all else is the same in both
    assert (expected - t.logits).abs().max() > 0.05
    joined, graph = join_experts(open_checkpoint(t.folder), open_checkpoint(file))
    with joined:
        torch.testing.assert_close(Runner(joined, graph=graph)(t.ids), expected, atol=TOLERANCE, rtol=0)


def test_nothing_but_experts_is_taken(tiny: Callable[[str], Tiny], tmp_path: Path) -> None:
    t = tiny("qwen3-moe")
    model = tiny_model("qwen3-moe")
    with torch.no_grad():
        for key, value in model.named_parameters():
            if ".experts." not in key:
                value.zero_()
    joined, graph = join_experts(open_checkpoint(t.folder), open_checkpoint(write_gguf(model, tmp_path / "e.gguf")))
    with joined:
        torch.testing.assert_close(Runner(joined, graph=graph)(t.ids), t.logits, atol=TOLERANCE, rtol=0)


def test_the_base_need_not_hold_experts(tiny: Callable[[str], Tiny], tmp_path: Path) -> None:
    t = tiny("qwen3-moe")
    shutil.copy(t.folder / "config.json", tmp_path)
    tensors = safetensors.torch.load_file(t.folder / "model.safetensors")
    kept = {name: tensor for name, tensor in tensors.items() if ".experts." not in name}
    assert len(kept) < len(tensors)
    safetensors.torch.save_file(kept, tmp_path / "model.safetensors")
    with pytest.raises(KtcoreError, match="is missing"):
        ktcore.load(tmp_path, backend="cpu", rules="reference")
    file = write_gguf(t.model, tmp_path / "e.gguf")
    with ktcore.load(tmp_path, backend="cpu", rules="reference", experts_from=file) as model:
        torch.testing.assert_close(model.logits(t.ids.tolist()), t.logits, atol=TOLERANCE, rtol=0)


def test_a_folder_may_give_experts_to_a_gguf_file(tiny: Callable[[str], Tiny], tmp_path: Path) -> None:
    t = tiny("v3")
    base = write_gguf(t.model, tmp_path / "base.gguf")
    with ktcore.load(base, backend="cpu", experts_from=t.folder) as model:
        torch.testing.assert_close(model.logits(t.ids.tolist()), t.logits, atol=2e-2, rtol=0)


@pytest.mark.parametrize(
    ("base", "other", "message"),
    [
        ("qwen3-moe", "llama", "has no routed experts to give to"),
        ("llama", "qwen3-moe", "family differ, qwen3_moe and llama"),
        ("qwen3-moe", "v3", r"'layers.0.ffn.experts'|experts of width"),
        ("qwen3-moe", "qwen3-moe-step", "holds no 'layers.0.ffn.experts'"),
        ("qwen3-moe", "mixtral", "has 8 experts of width 96 on hidden size 64 in .* not 16 experts of width 32"),
    ],
)
def test_other_models_are_refused(
    base: str, other: str, message: str, tiny: Callable[[str], Tiny], tmp_path: Path
) -> None:
    with pytest.raises(ArchitectureError, match=message) as caught:
        join_experts(open_checkpoint(tiny(base).folder), open_checkpoint(tiny(other).folder))
    assert str(tiny(base).folder) in str(caught.value)
    assert str(tiny(other).folder) in str(caught.value)


def test_a_shape_that_differs_is_named(tiny: Callable[[str], Tiny], tmp_path: Path) -> None:
    config = CONFIGS["qwen3-moe"]()
    config.moe_intermediate_size = 48
    folder = save(AutoModelForCausalLM.from_config(config), tmp_path)
    with pytest.raises(ArchitectureError, match=r"16 experts of width 48 .* not 16 experts of width 32"):
        join_experts(open_checkpoint(tiny("qwen3-moe").folder), open_checkpoint(folder))
