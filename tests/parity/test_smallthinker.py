"""SmallThinker against a plain torch model, from both kinds of checkpoint and through the engine."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import ktcore
from ktcore.ops import AttentionSpec, ExpertsSpec, KVCacheSpec, MoESpec, RouterSpec, Spec
from ktcore.weights import open_checkpoint

from .driver import Runner
from .smallthinker import CONFIG, logits, save_folder, save_gguf, weights

pytestmark = pytest.mark.usefixtures("one_thread")
TOLERANCE = 1e-4
VARIANTS: dict[str, dict[str, Any]] = {
    "21B": {},
    "21B-softmax": {"moe_primary_router_apply_softmax": True},
    "4B": {"rope_layout": [1] * 5, "sliding_window_layout": [0] * 5, "tie_word_embeddings": True},
    "mixed": {"rope_layout": [1, 0, 1, 1, 0], "sliding_window_layout": [1, 1, 0, 0, 1]},
}
IDS = torch.randint(3, 256, (96,), generator=torch.Generator().manual_seed(1))


def _config(name: str) -> dict[str, Any]:
    return CONFIG | VARIANTS[name]


@pytest.mark.parametrize("kind", ["safetensors", "gguf"])
@pytest.mark.parametrize("name", VARIANTS)
def test_prefill_decode_and_batches(name: str, kind: str, tmp_path: Path) -> None:
    if (name, kind) == ("mixed", "gguf"):
        pytest.skip("GGUF files do not hold the layouts")
    c = _config(name)
    w = weights(c)
    expected = logits(c, w, IDS)
    assert expected.std() > 0.2
    path = save_folder(c, w, tmp_path) if kind == "safetensors" else save_gguf(c, w, tmp_path / "tiny.gguf")
    with open_checkpoint(path) as checkpoint:
        run = Runner(checkpoint)
        torch.testing.assert_close(run(IDS), expected, atol=TOLERANCE, rtol=0)
        run.reset()
        pieces = [run(IDS[:33]), *(run(IDS[i : i + 1]) for i in range(33, 65)), run(IDS[65:])]
        torch.testing.assert_close(torch.cat(pieces), expected, atol=TOLERANCE, rtol=0)
        run.reset()
        other = IDS[40:67]
        batched = run.batch([IDS[:50], other])
        torch.testing.assert_close(batched[0], expected[:50], atol=TOLERANCE, rtol=0)
        torch.testing.assert_close(batched[1], logits(c, w, other), atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("rules", ["reference", None])
def test_through_the_engine(rules: str | None, tmp_path: Path) -> None:
    c = _config("21B")
    w = weights(c)
    with ktcore.load(save_folder(c, w, tmp_path), backend="cpu", rules=rules, context=256) as model:
        # wider with the default rules: the native cache holds 16 bits a value
        within = TOLERANCE if rules else 1e-2
        torch.testing.assert_close(model.logits(IDS), logits(c, w, IDS), atol=within, rtol=0)
        used = {c.implementation.id for c in model.plan.choices.values() if c.node.spec.op == "moe"}
        assert used == {"reference.moe" if rules else "cpu.moe"}


QUIRKS: Mapping[str, tuple[type[Spec], Callable[[Any], Spec]]] = {
    "router before attention": (MoESpec, lambda s: replace(s, early_router=False)),
    "ReLU": (ExpertsSpec, lambda s: replace(s, activation="silu")),
    "renormalisation": (RouterSpec, lambda s: replace(s, renormalise=False)),
    "sigmoid": (RouterSpec, lambda s: replace(s, score="softmax")),
    "window": (KVCacheSpec, lambda s: replace(s, window=0)),
    "no positions": (AttentionSpec, lambda s: replace(s, rope=None)),
}


@pytest.mark.parametrize("quirk", QUIRKS)
def test_parity_sees(quirk: str, tmp_path: Path) -> None:
    kind, wrong = QUIRKS[quirk]
    c = _config("21B")
    w = weights(c)
    with open_checkpoint(save_folder(c, w, tmp_path)) as checkpoint:
        found = Runner(checkpoint, mutate={kind: wrong})(IDS)
    assert (found - logits(c, w, IDS)).abs().max() > 10 * TOLERANCE
