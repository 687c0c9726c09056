"""The same weights written as GGUF, with all that converters change on the way, give transformers' logits."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from ktcore.ops import MLASpec
from ktcore.weights import open_checkpoint

from .conftest import Tiny
from .driver import Runner
from .gguf_writer import Layout, write_gguf
from .models import CONFIGS

pytestmark = pytest.mark.usefixtures("one_thread")
TOLERANCE = 1e-4
LATENT = ["v3", "kimi-k2", "moonlight", "v2-full", "v2-lite"]
# GGUF cannot express these: half pairing of latent attention, softmax weights without renormalisation for Qwen3-MoE
# (its key is never written), and a sliding window for the llama architecture
NOT_IN_GGUF = {"v3-half", "qwen3-moe-mixed", "mistral-window"}


@pytest.mark.parametrize("name", [n for n in CONFIGS if n not in NOT_IN_GGUF])
def test_gguf_matches_transformers(name: str, tiny: Callable[[str], Tiny], tmp_path: Path) -> None:
    t = tiny(name)
    with open_checkpoint(write_gguf(t.model, tmp_path / "tiny.gguf")) as checkpoint:
        torch.testing.assert_close(Runner(checkpoint)(t.ids), t.logits, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("absorbed", [True, False])
@pytest.mark.parametrize("layout", ["split", "fused", "both"])
def test_every_layout_of_the_latent_up_projection_is_read(
    layout: Layout, absorbed: bool, tiny: Callable[[str], Tiny], tmp_path: Path
) -> None:
    t = tiny("v3")
    with open_checkpoint(write_gguf(t.model, tmp_path / "tiny.gguf", layout)) as checkpoint:
        run = Runner(checkpoint, {MLASpec: {"absorbed": absorbed}})
        assert run.graph.node("layers.0.attn").spec.split_kv_b == (layout != "fused")
        torch.testing.assert_close(run(t.ids), t.logits, atol=TOLERANCE, rtol=0)
