"""LLaMA 4 as it is on the hub: the text model as a part of a larger one, with a prefix on all names."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from ktcore.weights import open_checkpoint

from .conftest import Tiny
from .driver import Runner

pytestmark = pytest.mark.usefixtures("one_thread")


def test_the_text_part_is_read(tiny: Callable[[str], Tiny], tmp_path: Path) -> None:
    t = tiny("llama4-scout")
    config = {"model_type": "llama4", "text_config": t.model.config.to_dict(), "vision_config": {"hidden_size": 8}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    tensors = {f"language_model.{name}": value.clone() for name, value in t.model.state_dict().items()}
    tensors["vision_model.class_embedding"] = torch.zeros(8)
    save_file(tensors, tmp_path / "model.safetensors")
    with open_checkpoint(tmp_path) as checkpoint:
        torch.testing.assert_close(Runner(checkpoint)(t.ids), t.logits, atol=1e-4, rtol=0)
