"""MXFP4 of gpt-oss and of compressed-tensors: exact against transformers' own unpacking and the format's table."""

from __future__ import annotations

import json
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from ktcore.errors import CheckpointError
from ktcore.weights import open_checkpoint
from ktcore.weights.ref import WeightRef

Write = Callable[..., Path]
METHOD = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.embed_tokens"]}
COMPRESSED = {
    "quant_method": "compressed-tensors",
    "format": "mxfp4-pack-quantized",
    "config_groups": {
        "g": {
            "targets": ["Linear"],
            "weights": {"num_bits": 4, "type": "float", "strategy": "group", "group_size": 32},
        }
    },
}
EXPERTS, WIDTH, HIDDEN = 3, 24, 96
E2M1 = [0, 0.5, 1, 1.5, 2, 3, 4, 6]


def random_blocks(*rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    blocks = torch.randint(0, 256, (*rows, HIDDEN // 32, 16), dtype=torch.uint8, generator=generator)
    return blocks, torch.randint(100, 140, (*rows, HIDDEN // 32), dtype=torch.uint8, generator=generator)


def test_gpt_oss_experts(write_folder: Write) -> None:
    blocks, scales = random_blocks(EXPERTS, 2 * WIDTH)
    folder = write_folder(METHOD, {"e.gate_up_proj_blocks": blocks, "e.gate_up_proj_scales": scales})
    theirs = convert_moe_packed_tensors(blocks, scales, dtype=torch.float32).transpose(1, 2)  # they give [E, in, out]
    with open_checkpoint(folder) as checkpoint:
        both = WeightRef.of(checkpoint, "e.gate_up_proj")
        assert (both.format, both.shape) == ("MXFP4", (EXPERTS, 2 * WIDTH, HIDDEN))
        torch.testing.assert_close(both.open(checkpoint).tensor(), theirs, rtol=0, atol=0)
        gate = both.pick_rows((0, 2 * WIDTH, 2)).open(checkpoint)
        up = both.pick_rows((1, 2 * WIDTH, 2)).open(checkpoint)
        assert up.shape == (EXPERTS, WIDTH, HIDDEN)
        torch.testing.assert_close(gate.tensor(), theirs[:, ::2], rtol=0, atol=0)
        torch.testing.assert_close(up.tensor(), theirs[:, 1::2], rtol=0, atol=0)
        torch.testing.assert_close(up.part(2).tensor(), theirs[2, 1::2], rtol=0, atol=0)
        torch.testing.assert_close(up.subset([2, 0]).tensor(), theirs[[2, 0], 1::2], rtol=0, atol=0)


def test_raw_rows_are_ggufs_blocks(write_folder: Write) -> None:
    blocks, scales = random_blocks(8)
    folder = write_folder(METHOD, {"w_blocks": blocks, "w_scales": scales})
    with open_checkpoint(folder) as checkpoint:
        raw = checkpoint.raw("w").reshape(8, -1)
    values = gguf.quants.dequantize(raw, gguf.GGMLQuantizationType.MXFP4)
    codes = torch.stack((blocks & 15, blocks >> 4), -1).flatten(-2).numpy()
    table = np.array(E2M1 + [-v for v in E2M1])
    want = table[codes] * 2.0 ** (scales.numpy().astype(np.float64)[..., None] - 127)
    np.testing.assert_array_equal(values, want.reshape(8, HIDDEN).astype(np.float32))


def test_compressed_tensors_mxfp4(write_folder: Write) -> None:
    blocks, scales = random_blocks(8)
    tensors = {"a.weight_packed": blocks.reshape(8, HIDDEN // 2), "a.weight_scale": scales}
    with open_checkpoint(write_folder(COMPRESSED, tensors)) as checkpoint:
        found = WeightRef.of(checkpoint, "a.weight").open(checkpoint).tensor()
    theirs = convert_moe_packed_tensors(blocks[None], scales[None], dtype=torch.float32)[0].T
    torch.testing.assert_close(found, theirs, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"w_blocks": random_blocks(8)[0]}, "tensor 'w_scales' is missing, which belongs to 'w'"),
        ({"w_blocks": random_blocks(8)[0][..., :15]}, r"'w_blocks' has shape \[8, 3, 15\], expected \[..., rows"),
        (
            {"w_blocks": random_blocks(8)[0], "w_scales": random_blocks(8)[1][:7]},
            r"'w_scales' has shape \[7, 3\], expected \[8, 3\]",
        ),
    ],
)
def test_bad_tensors_are_named(tensors: dict[str, torch.Tensor], message: str, write_folder: Write) -> None:
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(write_folder(METHOD, tensors))


@pytest.mark.parametrize("shape", [(48,), (8, 47), (8, 8), (3, 8, 24)])
def test_packed_rows_that_are_no_whole_blocks_are_named(shape: tuple[int, ...], write_folder: Write) -> None:
    codes = torch.zeros(shape, dtype=torch.uint8)
    scales = torch.full((*shape[:-1], shape[-1] // 16), 127, dtype=torch.uint8)
    with pytest.raises(CheckpointError, match=r"'a\.weight_packed' has shape \[.*\], expected \[\.\.\., cols / 2\]"):
        open_checkpoint(write_folder(COMPRESSED, {"a.weight_packed": codes, "a.weight_scale": scales}))


def test_a_weight_lies_where_its_codes_are(write_folder: Write) -> None:
    blocks, scales = random_blocks(8)
    folder = write_folder(METHOD, {"w_blocks": blocks})
    (folder / "model.safetensors").rename(folder / "codes.safetensors")
    save_file({"w_scales": scales, "norm": torch.ones(2)}, folder / "scales.safetensors")
    files = {"w_blocks": "codes.safetensors", "w_scales": "scales.safetensors", "norm": "scales.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))
    with open_checkpoint(folder) as checkpoint:
        assert checkpoint.file_of("w").name == "codes.safetensors"
        assert checkpoint.file_of("norm").name == "scales.safetensors"


def test_an_expert_is_converted_alone(write_folder: Write) -> None:
    """Peak memory of one expert's rows does not grow with the stack."""
    blocks = torch.zeros(64, 128, 32, 16, dtype=torch.uint8)
    folder = write_folder(
        METHOD, {"w_blocks": blocks, "w_scales": torch.full(blocks.shape[:3], 127, dtype=torch.uint8)}
    )
    with open_checkpoint(folder) as checkpoint:
        weight = WeightRef.of(checkpoint, "w").pick_rows((1, 128, 2)).open(checkpoint)
        tracemalloc.start()
        for e in range(64):
            weight.part(e).raw()
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    one = 128 * 32 * 17
    assert peak < 6 * one < weight.ref.nbytes / 4
