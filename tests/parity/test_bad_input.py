"""Damaged and contradictory checkpoints are refused before anything loads, with file, tensor, expected and found."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

import ktcore
from ktcore.errors import ArchitectureError, CheckpointError, KtcoreError

from .conftest import Tiny
from .gguf_writer import write_gguf

DOWN = "model.layers.2.mlp.experts.5.down_proj.weight"


@pytest.fixture
def sharded(tiny: Callable[[str], Tiny], tmp_path: Path) -> Path:
    """Qwen3-MoE in several files."""
    tiny("qwen3-moe").model.save_pretrained(tmp_path, max_shard_size="200KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 3
    return tmp_path


def _load(path: Path) -> None:
    ktcore.load(path, backend="cpu", rules="reference", context=64).close()


def _index(folder: Path) -> tuple[Path, dict[str, str]]:
    path = folder / "model.safetensors.index.json"
    return path, json.loads(path.read_text())["weight_map"]


def _edit(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_the_model_itself_loads(sharded: Path) -> None:
    _load(sharded)


def test_a_missing_shard_is_named(sharded: Path) -> None:
    shard = sharded / _index(sharded)[1][DOWN]
    shard.unlink()
    with pytest.raises(CheckpointError, match=f"{shard}: the index lists this shard, but it is missing"):
        _load(sharded)


def test_a_cut_shard_is_named_with_bytes(sharded: Path) -> None:
    shard = sharded / _index(sharded)[1][DOWN]
    shard.write_bytes(shard.read_bytes()[:-1000])
    with pytest.raises(CheckpointError, match=f"{shard}: tensor .* takes .* bytes from byte .*the file ends at byte"):
        _load(sharded)


def test_an_index_that_names_an_absent_tensor(sharded: Path) -> None:
    path, names = _index(sharded)
    shard = names[DOWN]
    names["model.layers.9.mlp.gate.weight"] = shard
    path.write_text(json.dumps({"weight_map": names}))
    with pytest.raises(CheckpointError, match=rf"{path}: puts tensor model\.layers\.9.* into {shard}, which does not"):
        _load(sharded)


def test_a_tensor_that_the_index_forgot(sharded: Path) -> None:
    path, names = _index(sharded)
    del names[DOWN]
    path.write_text(json.dumps({"weight_map": names}))
    with pytest.raises(CheckpointError, match=rf"{sharded}: tensor '{DOWN}' is missing"):
        _load(sharded)


def test_one_expert_of_another_shape(sharded: Path) -> None:
    shard = sharded / _index(sharded)[1][DOWN]
    tensors = load_file(shard)
    tensors[DOWN] = tensors[DOWN][:, :16].contiguous()
    save_file(tensors, shard)
    with pytest.raises(CheckpointError, match=rf"'{DOWN}' is F32\[64, 16\], but .*experts\.0.* is F32\[64, 32\]"):
        _load(sharded)


@pytest.mark.parametrize(
    ("change", "tensor", "found", "expected"),
    [
        ({"moe_intermediate_size": 48}, r"experts\.0\.gate_proj\.weight", [32, 64], [48, 64]),
        ({"num_key_value_heads": 4}, r"layers\.0\.self_attn\.k_proj\.weight", [64, 64], [128, 64]),
        ({"vocab_size": 300}, r"embed_tokens\.weight", [256, 64], [300, 64]),
        ({"num_experts": None, "num_local_experts": 12}, r"layers\.0\.mlp\.gate\.weight", [16, 64], [12, 64]),
    ],
)
def test_a_shape_that_contradicts_the_configuration(
    change: dict[str, object], tensor: str, found: list[int], expected: list[int], sharded: Path
) -> None:
    _edit(sharded, **change)
    with pytest.raises(ArchitectureError) as caught:
        _load(sharded)
    caught.match(rf"{sharded}/model-0000.*\.safetensors: tensor '.*{tensor}' has shape")
    assert f"has shape {found}, but the configuration asks for {expected}" in str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"quantization_config": {"quant_method": "hqq"}}, "'hqq'"),
        ({"rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4}}, "rope type 'longrope' is not supported"),
        ({"hidden_act": "quick_gelu"}, "activation 'quick_gelu' is unknown"),
        ({"model_type": "mamba2"}, "architecture 'mamba2' is not supported"),
        ({"num_experts_per_tok": 17}, "cannot choose 17 of 16 experts"),
        ({"final_logit_softcapping": 30.0}, r"final_logit_softcapping is 30\.0"),
        ({"model_type": "mixtral"}, r"tensor '.*' (is missing|has shape)"),
    ],
)
def test_what_is_not_supported_is_named_with_the_folder(change: dict[str, object], message: str, sharded: Path) -> None:
    _edit(sharded, **change)
    with pytest.raises(KtcoreError, match=message) as caught:
        _load(sharded)
    assert str(sharded) in str(caught.value)


def test_norms_that_the_configured_family_has_not(sharded: Path) -> None:
    _edit(sharded, model_type="qwen2_moe", shared_expert_intermediate_size=32)
    with pytest.raises(KtcoreError, match=r"shared_expert\.gate_proj\.weight' is missing"):
        _load(sharded)


def test_a_gguf_file_with_a_contradiction(tiny: Callable[[str], Tiny], tmp_path: Path) -> None:
    path = write_gguf(tiny("qwen3-moe").model, tmp_path / "tiny.gguf")
    data = path.read_bytes()
    key = b"qwen3moe.expert_feed_forward_length"
    at = data.index(key) + len(key) + 4
    path.write_bytes(data[:at] + (48).to_bytes(4, "little") + data[at + 4 :])
    expected = (
        r"'blk\.0\.ffn_gate_exps\.weight' has shape \[16, 32, 64\], but the configuration asks for \[16, 48, 64\]"
    )
    with pytest.raises(ArchitectureError, match=rf"{path}: tensor {expected}"):
        _load(path)
