"""gpt-oss as it is released: experts in MXFP4 blocks whose rows of gate and up take turns."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

import ktcore
from ktcore.weights import open_checkpoint

from .driver import Runner
from .models import CONFIGS, tiny_model

pytestmark = pytest.mark.usefixtures("one_thread")


def test_mxfp4_experts_match_transformers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = {"intermediate_size": 64, "num_hidden_layers": 2, "layer_types": ["sliding_attention", "full_attention"]}
    original = CONFIGS["gpt-oss"]
    monkeypatch.setitem(CONFIGS, "gpt-oss", lambda: type(config := original())(**(config.to_dict() | sizes)))
    model = tiny_model("gpt-oss")
    g = torch.Generator().manual_seed(8)
    tensors = {}
    with torch.no_grad():
        for name, value in model.state_dict().items():
            if not name.endswith(("gate_up_proj", "down_proj")):
                tensors[name] = value.clone()
                continue
            experts, columns, rows = value.shape
            blocks = torch.randint(0, 256, (experts, rows, columns // 32, 16), generator=g, dtype=torch.uint8)
            scales = torch.randint(120, 125, (experts, rows, columns // 32), generator=g, dtype=torch.uint8)
            value.copy_(convert_moe_packed_tensors(blocks, scales, dtype=torch.float32))
            tensors |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
        ids = torch.randint(3, 256, (48,), generator=g)
        expected = model(ids[None]).logits[0]
    section = {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head", "model.embed_tokens"]}
    (tmp_path / "config.json").write_text(json.dumps(model.config.to_dict() | {"quantization_config": section}))
    save_file(tensors, tmp_path / "model.safetensors")
    with open_checkpoint(tmp_path) as checkpoint:
        run = Runner(checkpoint)
        assert run.graph.node("layers.0.ffn.experts").spec.formats() == ("MXFP4",)
        torch.testing.assert_close(run(ids), expected, atol=1e-4, rtol=0)
    with ktcore.load(tmp_path, backend="cpu", context=256) as loaded:
        torch.testing.assert_close(loaded.logits(ids), expected, atol=2e-2, rtol=0)
