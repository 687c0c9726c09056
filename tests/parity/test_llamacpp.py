"""Where llama.cpp knows an architecture, its logits of the same F16 file are ours."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from ktcore.weights import open_checkpoint

from . import llamacpp
from .conftest import Tiny
from .driver import Runner
from .gguf_writer import write_gguf

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(llamacpp.interpreter() is None, reason=llamacpp.WHY_NOT),
]
TOLERANCE = 2e-2
TIES = 3  # tokens for which 16-bit activations may choose another expert, since two score nearly the same
# Left out: v2-full (llama.cpp scores groups by two experts as V3 does), kimi-k2 (it takes 32 for the file's
# yarn_beta_fast of 1), qwen3-wide (it has no biases there), v2-lite and moonlight (it wants 27 layers where q has no
# low rank)
FAMILIES = [
    "llama",
    "llama-bias",
    "llama-yarn",
    "smollm2",
    "mistral",
    "qwen2",
    "qwen3",
    "glm4",
    "mixtral",
    "qwen2-moe",
    "qwen3-moe",
    "glm4-moe",
    "glm4-air",
    "v3",
]


@pytest.mark.parametrize("name", FAMILIES)
def test_logits_are_llamacpps(name: str, tiny: Callable[[str], Tiny], tmp_path: Path) -> None:
    t = tiny(name)
    path = write_gguf(t.model, tmp_path / "tiny.gguf", half=True)
    theirs = llamacpp.logits(path, t.ids)
    with open_checkpoint(path) as checkpoint:
        assert "F16" in {info.format for info in checkpoint.tensors.values()}
        ours = Runner(checkpoint)(t.ids)
    difference = (ours - theirs).abs().amax(-1)
    assert difference.median() < TOLERANCE / 2
    assert (difference > TOLERANCE).sum() <= TIES
