"""Where llama.cpp knows an architecture, its logits of the same F16 file are ours."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import ktcore
from ktcore.ops import MLASpec, RopeSpec, Spec
from ktcore.weights import open_checkpoint

from . import llamacpp, smallthinker
from .conftest import Tiny
from .driver import Runner
from .gguf_writer import write_gguf

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(llamacpp.interpreter() is None, reason=llamacpp.WHY_NOT),
]
TOLERANCE = 2e-2
TIES = 3  # tokens for which 16-bit activations may choose another expert, since two score nearly the same
# Left out: glm4-lite (it takes softmax unless layers and vocabulary are the released model's), v2-full (llama.cpp
# scores groups by two experts as V3 does), kimi-k2 (it takes 32 for the file's yarn_beta_fast of 1), qwen3-wide (it has
# no biases there), v2-lite and moonlight (it wants 27 layers where q has no low rank)
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
    "minimax-m2",
    "hy3",
    "olmoe",
    "ernie",
    "dots1",
    "mistral4",
    "v3",
    "kimi-linear",
    "llama4-gguf",
]
# in these, a token whose 16-bit activations choose another expert moves many later ones, so the files are float32
IN_32_BITS = [
    "qwen3-next",
    "qwen3.5",
    "qwen3.5-moe",
    "gpt-oss-gguf",
    "v32",
    "glm-dsa",
    "glm5-next",
    "v4-released",
]
IN_32_BITS += ["gemma4-all", "gemma4-dense", "mimo", "step", "hunyuan-gguf", "afmoe"]
# llama.cpp keeps index keys in 16 bits: where two score nearly the same it attends to another token
BEGINNINGS = {"glm-dsa": 48}
# where llama.cpp's keys in 16 bits move more: scores that no root divides, or a choice of experts by a hair
SHARP = ("gemma4-all", "gemma4-dense", "mimo")
# llama.cpp lets YaRN's ramp begin and end at whole pairs, which gpt-oss's own code does not
# and does without the temperature of queries, of which its converter writes nothing
THEIRS: dict[str, dict[type[Spec], Callable[[Any], Spec]]] = {
    "mistral4": {MLASpec: lambda s: replace(s, temperature=None)}
}
THEIR_RAMP = {RopeSpec: lambda s: replace(s, scaling=replace(s.scaling, truncate=True))}


@pytest.mark.parametrize("name", FAMILIES)
def test_logits_are_llamacpps(name: str, tiny: Callable[[str], Tiny], tmp_path: Path) -> None:
    t = tiny(name)
    path = write_gguf(t.model, tmp_path / "tiny.gguf", half=True)
    theirs = llamacpp.logits(path, t.ids)
    with open_checkpoint(path) as checkpoint:
        assert "F16" in {info.format for info in checkpoint.tensors.values()}
        ours = Runner(checkpoint, mutate=THEIRS.get(name))(t.ids)
    _check(ours, theirs)


@pytest.mark.parametrize("name", IN_32_BITS)
def test_logits_of_float32_files_are_llamacpps(name: str, tiny: Callable[[str], Tiny], tmp_path: Path) -> None:
    t = tiny(name)
    ids = t.ids[: BEGINNINGS.get(name)]
    path = write_gguf(t.model, tmp_path / "tiny.gguf", no_vocabulary=True)
    theirs = llamacpp.logits(path, ids, float32_cache=name in SHARP)
    with open_checkpoint(path) as checkpoint:
        ours = Runner(checkpoint, mutate=THEIR_RAMP if name.startswith("gpt-oss") else None)(ids)
    _check(ours, theirs)


def test_logits_of_minimax_m3_are_llamacpps_over_chosen_blocks(tiny: Callable[[str], Tiny], tmp_path: Path) -> None:
    """Without flash attention it attends to all tokens."""
    t = tiny("minimax-m3")
    path = write_gguf(t.model, tmp_path / "tiny.gguf", no_vocabulary=True)
    theirs = llamacpp.logits(path, t.ids, flash=True)
    with open_checkpoint(path) as checkpoint:
        ours = Runner(checkpoint)(t.ids)
    budget = t.model.config.index_block_size * t.model.config.index_topk_blocks
    assert (theirs - llamacpp.logits(path, t.ids)).abs().amax(-1)[budget:].min() > TOLERANCE
    _check(ours, theirs)


def test_logits_behind_an_entry_of_128_tokens_are_llamacpps(tiny: Callable[[str], Tiny], tmp_path: Path) -> None:
    path = write_gguf(tiny("v4-released").model, tmp_path / "tiny.gguf", no_vocabulary=True)
    ids = torch.randint(3, 256, (200,), generator=torch.Generator().manual_seed(2))
    with ktcore.load(path, backend="cpu", rules="reference", context=256, threads=1) as model:
        _check(model.logits(ids), llamacpp.logits(path, ids))


def test_logits_of_flash_next_are_llamacpps_where_no_place_is_left(tiny: Callable[[str], Tiny], tmp_path: Path) -> None:
    """It fills what the open tail leaves of a choice with tokens of the next best block, so choices agree where the
    tail is full; the last layer alone chooses, and other tokens' choices do not reach these."""
    t = tiny("qwen4-exp")
    assert t.model.config.layer_types.index("indexed_attention") == len(t.model.config.layer_types) - 1
    path = write_gguf(t.model, tmp_path / "tiny.gguf", no_vocabulary=True)
    theirs = llamacpp.logits(path, t.ids)
    with open_checkpoint(path) as checkpoint:
        ours = Runner(checkpoint)(t.ids)
    c = t.model.config
    _check(ours[: c.indexer_budget + 3], theirs[: c.indexer_budget + 3])
    _check(ours[2::4], theirs[2::4])


# layouts that it takes for granted, as in the released models
@pytest.mark.parametrize(
    "changes",
    [
        {"rope_layout": [0, 1, 1, 1, 0], "sliding_window_size": 4096},
        {"rope_layout": [1] * 5, "sliding_window_layout": [0] * 5, "moe_primary_router_apply_softmax": True},
    ],
)
def test_logits_of_smallthinker_are_llamacpps(changes: dict[str, Any], tmp_path: Path) -> None:
    c = smallthinker.CONFIG | changes
    path = smallthinker.save_gguf(c, smallthinker.weights(c), tmp_path / "tiny.gguf", half=True)
    ids = torch.randint(3, 256, (96,), generator=torch.Generator().manual_seed(1))
    theirs = llamacpp.logits(path, ids)
    with open_checkpoint(path) as checkpoint:
        assert "F16" in {info.format for info in checkpoint.tensors.values()}
        _check(Runner(checkpoint)(ids), theirs)


def _check(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    difference = (ours - theirs).abs().amax(-1)
    assert difference.median() < TOLERANCE / 2
    assert (difference > TOLERANCE).sum() <= TIES
