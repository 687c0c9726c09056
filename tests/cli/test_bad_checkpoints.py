"""Damaged or contradictory checkpoints: `run` and `plan` say which file and tensor, expected and found."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import Qwen3MoeForCausalLM

Fails = Callable[..., str]
COMMANDS = [("plan",), ("run", "Hi")]
DOWN = "model.layers.1.mlp.experts.5.down_proj.weight"


@pytest.fixture(params=COMMANDS, ids=["plan", "run"])
def refused(request: pytest.FixtureRequest, fails: Fails) -> Callable[[Path], str]:
    """stderr of the command on a folder that it must refuse."""
    command, *rest = request.param
    return lambda folder: fails(command, folder, *rest, "--backend", "cpu")


@pytest.fixture
def sharded(tiny_moe: Path, tmp_path: Path) -> Path:
    Qwen3MoeForCausalLM.from_pretrained(tiny_moe).save_pretrained(tmp_path, max_shard_size="100KB")
    return tmp_path


def _index(folder: Path) -> tuple[Path, dict[str, str]]:
    path = folder / "model.safetensors.index.json"
    return path, json.loads(path.read_text())["weight_map"]


def test_a_missing_shard(refused: Callable[[Path], str], sharded: Path) -> None:
    shard = sharded / _index(sharded)[1][DOWN]
    shard.unlink()
    assert f"{shard}: the index lists this shard, but it is missing" in refused(sharded)


def test_an_index_that_names_an_absent_tensor(refused: Callable[[Path], str], sharded: Path) -> None:
    path, names = _index(sharded)
    names["model.layers.9.mlp.gate.weight"] = names[DOWN]
    path.write_text(json.dumps({"weight_map": names}))
    err = refused(sharded)
    assert f"{path}: puts tensor model.layers.9.mlp.gate.weight into {names[DOWN]}, which does not" in err


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"moe_intermediate_size": 48}, ("safetensors: tensor 'model.layers.0.mlp.experts.0", "[32, 64]", "[48, 64]")),
        ({"vocab_size": 300}, ("safetensors: tensor 'model.embed_tokens.weight'", "[256, 64]", "[300, 64]")),
        ({"quantization_config": {"quant_method": "hqq"}}, ("'hqq'",)),
        ({"quantization_config": {"bits": 4}}, ("quant",)),
        ({"rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4}}, ("rope type 'longrope'",)),
        ({"model_type": "mamba2"}, ("architecture 'mamba2' is not supported",)),
        ({"hidden_act": "quick_gelu"}, ("activation 'quick_gelu'",)),
    ],
    ids=["experts", "vocabulary", "method", "no-method", "rope", "family", "activation"],
)
def test_a_configuration_that_does_not_fit(
    refused: Callable[[Path], str], sharded: Path, change: dict[str, object], words: tuple[str, ...]
) -> None:
    path = sharded / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    err = refused(sharded)
    assert str(sharded) in err
    assert all(word in err for word in words), err
