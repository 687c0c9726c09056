"""A config.json alone: which format each tensor that a model asks for is taken to have."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ktcore.errors import CheckpointError
from ktcore.weights.bare import open_config

FP8 = {"quant_method": "fp8", "weight_block_size": [128, 128]}
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 64}
MXFP4 = {"quant_method": "mxfp4"}
TALL = {"quant_method": "fp8", "weight_block_size": [1, 128]}
SMALL = {"quant_method": "fp8", "weight_block_size": [32, 32]}


def taken(folder: Path, config: dict[str, Any], name: str, shape: tuple[int, ...], weights: str | None = None) -> Any:
    """What a tensor is taken for once it is asked for."""
    (folder / "config.json").write_text(json.dumps(config))
    checkpoint = open_config(folder / "config.json", weights)
    checkpoint.expect(name, shape)
    return checkpoint.tensors[name]


@pytest.mark.parametrize(
    ("section", "name", "shape", "fmt"),
    [
        (None, "a.q_proj.weight", (64, 256), "BF16"),
        (FP8, "a.q_proj.weight", (64, 256), "F8_E4M3_G128"),
        (FP8, "a.q_proj.weight", (64, 192), "BF16"),  # a row that is no whole number of 128
        (FP8, "a.norm.weight", (256,), "BF16"),
        (TALL, "a.q_proj.weight", (64, 256), "F8_E4M3_G128"),
        (SMALL, "a.q_proj.weight", (64, 256), "F8_E4M3_G32"),
        (SMALL | {"weight_block_size": [16, 16], "scale_fmt": "ue8m0"}, "a.q_proj.weight", (64, 256), "BF16"),
        ({"quant_method": "mxfp8"}, "a.q_proj.weight", (64, 256), "F8_E4M3_G32"),
        (FP8, "a.gate.weight", (64, 256), "BF16"),
        (GPTQ, "a.o_proj.weight", (64, 256), "INT4_G64"),
        (GPTQ, "embed_tokens.weight", (64, 256), "BF16"),
        (MXFP4, "mlp.experts.down_proj", (4, 64, 256), "MXFP4"),
        (MXFP4, "mlp.router.weight", (4, 256), "BF16"),
    ],
)
def test_the_released_format_is_for_whole_rows_of_projections(
    section: Any, name: str, shape: tuple[int, ...], fmt: str, tmp_path: Path
) -> None:
    info = taken(tmp_path, {} if section is None else {"quantization_config": section}, name, shape)
    assert (info.format, info.shape) == (fmt, shape)


def test_a_format_that_is_asked_for_is_that_of_all_matrices_but_the_router(tmp_path: Path) -> None:
    wanted = {"embed_tokens.weight": "INT8_G64", "a.norm.weight": "F16", "a.router.weight": "F16"}
    for name, fmt in wanted.items():
        shape = (256,) if "norm" in name else (8, 256)
        assert taken(tmp_path, {"dtype": "float16"}, name, shape, weights="INT8_G64").format == fmt


def test_bytes_are_those_of_the_blocks(tmp_path: Path) -> None:
    info = taken(tmp_path, {"quantization_config": GPTQ}, "experts.up_proj.weight", (3, 64, 256))
    assert info.nbytes == 3 * 64 * (256 // 64) * (2 + 2 + 64 // 2)  # scale, zero point, codes


@pytest.mark.parametrize("config", [{"model_type": "qwen2_moe"}, {"model_type": "gpt_oss", "attention_bias": True}])
def test_it_cannot_tell_of_biases_which_the_family_does(config: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    checkpoint = open_config(tmp_path / "config.json")
    assert checkpoint.weightless
    assert not any(checkpoint.holds(f"model.layers.0.self_attn.{p}_proj.bias") for p in "qkvo")


def test_there_are_no_bytes_to_read(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="holds no weights"):
        open_config(tmp_path / "config.json").raw("w")
