"""Folders written by transformers give transformers' logits."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from ktcore.ops import MLASpec
from ktcore.weights import open_checkpoint

from .conftest import Tiny
from .driver import Runner
from .models import CONFIGS

pytestmark = pytest.mark.usefixtures("one_thread")
TOLERANCE = 1e-4
LATENT = ["v3", "v3-half", "kimi-k2", "moonlight", "v2-full", "v2-lite"]


@pytest.mark.parametrize("name", CONFIGS)
def test_full_prefill_and_decode_match_transformers(name: str, tiny: Callable[[str], Tiny]) -> None:
    t = tiny(name)
    with open_checkpoint(t.folder) as checkpoint:
        run = Runner(checkpoint)
        assert t.logits.std() > 0.2, "a model that says nothing proves nothing"
        torch.testing.assert_close(run(t.ids), t.logits, atol=TOLERANCE, rtol=0)
        run.reset()
        # prefill, decode over a page's end, prefill again on top of it
        pieces = [run(t.ids[:33]), *(run(t.ids[i : i + 1]) for i in range(33, 50)), run(t.ids[50:])]
        torch.testing.assert_close(torch.cat(pieces), t.logits, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("name", LATENT)
def test_plain_latent_attention_matches_transformers(name: str, tiny: Callable[[str], Tiny]) -> None:
    t = tiny(name)
    with open_checkpoint(t.folder) as checkpoint:
        run = Runner(checkpoint, {MLASpec: {"absorbed": False}})
        chunked = torch.cat((run(t.ids[:50]), run(t.ids[50:])))
    torch.testing.assert_close(chunked, t.logits, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("name", ["qwen3-moe", "v3"])
def test_fused_expert_tensors_are_read(name: str, tiny: Callable[[str], Tiny], tmp_path: Path) -> None:
    t = tiny(name)
    t.model.save_pretrained(tmp_path, save_original_format=False)
    with open_checkpoint(tmp_path) as checkpoint:
        assert any(tensor.endswith("experts.gate_up_proj") for tensor in checkpoint.tensors)
        torch.testing.assert_close(Runner(checkpoint)(t.ids), t.logits, atol=TOLERANCE, rtol=0)
