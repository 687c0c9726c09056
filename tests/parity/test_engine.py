"""The whole engine with the reference rules gives transformers' logits and transformers' greedy tokens."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import ktcore

from .conftest import Tiny
from .gguf_writer import write_gguf

pytestmark = pytest.mark.usefixtures("one_thread")
TOLERANCE = 1e-4
FAMILIES = [
    "llama",
    "glm4",
    "mixtral",
    "qwen2-moe",
    "glm4-moe",
    "smollm2",
    "qwen3-moe",
    "v3",
    "kimi-k2",
    "moonlight",
    "glm-dsa-shared",
    "v2-full",
    "qwen3-next",
    "v4",
    "kimi-linear",
    "glm5-next",
    "qwen4-exp",
    "minimax-m3",
    "llama4-gguf",
    "gpt-oss-gguf",
]
NEW_TOKENS = 24


@pytest.mark.parametrize("kind", ["safetensors", "gguf"])
@pytest.mark.parametrize("name", FAMILIES)
def test_loaded_model_matches_transformers(name: str, kind: str, tiny: Callable[[str], Tiny], tmp_path: Path) -> None:
    t = tiny(name)
    path = t.folder if kind == "safetensors" else write_gguf(t.model, tmp_path / "tiny.gguf")
    with ktcore.load(path, backend="cpu", rules="reference", context=256) as model:
        torch.testing.assert_close(model.logits(t.ids), t.logits, atol=TOLERANCE, rtol=0)
        # two rows of different content in one batch
        prompts = torch.stack((t.ids[:40], t.ids[40:80]))
        ours = model.generate(prompts, max_new_tokens=NEW_TOKENS, temperature=0)
    assert torch.equal(ours, t.generated(prompts, NEW_TOKENS))


@pytest.mark.parametrize("name", ["llama4-scout", "gpt-oss"])
def test_hub_constants_go_through_the_engine(name: str, tiny: Callable[[str], Tiny]) -> None:
    t = tiny(name)
    with ktcore.load(t.folder, backend="cpu", rules="reference", context=256) as model:
        torch.testing.assert_close(model.logits(t.ids), t.logits, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize(
    "name", ["llama", "qwen3-moe", "v3", "moonlight", "qwen3-next", "llama4-scout", "llama4-maverick", "gpt-oss"]
)
def test_parts_of_different_backends_work_together(name: str, tiny: Callable[[str], Tiny]) -> None:
    t = tiny(name)
    with ktcore.load(t.folder, backend="cpu", context=256) as model:
        owners = {choice.implementation.id.split(".")[0] for choice in model.plan.choices.values()}
        logits = model.logits(t.ids)
    assert owners == {"cpu", "reference"}
    # wider than float32's: the native cache holds 16 bits a value
    torch.testing.assert_close(logits, t.logits, atol=1e-2, rtol=0)
