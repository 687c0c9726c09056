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
LATENT = [
    "glm4-lite",
    "mistral4",
    "v3",
    "v3-half",
    "kimi-k2",
    "moonlight",
    "v2-full",
    "v2-lite",
    "v32",
    "glm-dsa-shared",
    "kimi-linear",
    "glm5-next",
]


@pytest.mark.parametrize("name", CONFIGS)
def test_full_prefill_and_decode_match_transformers(name: str, tiny: Callable[[str], Tiny]) -> None:
    t = tiny(name)
    with open_checkpoint(t.folder) as checkpoint:
        run = Runner(checkpoint)
        assert t.logits.std() > 0.2, "a model that says nothing proves nothing"
        torch.testing.assert_close(run(t.ids), t.logits, atol=TOLERANCE, rtol=0)
        run.reset()
        # prefill, 32 steps of one token over two pages' ends, prefill again on top of it
        pieces = [run(t.ids[:33]), *(run(t.ids[i : i + 1]) for i in range(33, 65)), run(t.ids[65:])]
        torch.testing.assert_close(torch.cat(pieces), t.logits, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_ragged_batch_gives_each_sequence_its_own_logits(name: str, tiny: Callable[[str], Tiny]) -> None:
    t = tiny(name)
    prompts = [t.ids[:37], t.ids[50:51], t.ids[20:90]]
    with open_checkpoint(t.folder) as checkpoint:
        run = Runner(checkpoint)
        # the second step decodes one sequence and goes on with the prompts of the others
        first = run.batch([p[: len(p) - 1] if len(p) == 37 else p for p in prompts])
        second = run.batch([prompts[0][36:], t.ids[51:60], t.ids[90:91]])
        alone = []
        for ids in (t.ids[:37], t.ids[50:60], t.ids[20:91]):
            run.reset()
            alone.append(run(ids))
    for a, b, expected in zip(first, second, alone, strict=True):
        torch.testing.assert_close(torch.cat((a, b)), expected, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("name", LATENT)
def test_plain_latent_attention_matches_transformers(name: str, tiny: Callable[[str], Tiny]) -> None:
    t = tiny(name)
    with open_checkpoint(t.folder) as checkpoint:
        run = Runner(checkpoint, {MLASpec: {"absorbed": False}})
        chunked = torch.cat((run(t.ids[:50]), run(t.ids[50:])))
    torch.testing.assert_close(chunked, t.logits, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("name", ["qwen3-moe", "v3", "mixtral", "qwen2-moe", "glm4-moe"])
def test_fused_expert_tensors_are_read(name: str, tiny: Callable[[str], Tiny], tmp_path: Path) -> None:
    t = tiny(name)
    t.model.save_pretrained(tmp_path, save_original_format=False)
    with open_checkpoint(tmp_path) as checkpoint:
        assert any(tensor.endswith("experts.gate_up_proj") for tensor in checkpoint.tensors)
        torch.testing.assert_close(Runner(checkpoint)(t.ids), t.logits, atol=TOLERANCE, rtol=0)
