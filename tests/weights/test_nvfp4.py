"""NVFP4 of compressed-tensors and ModelOpt: exact against float64, codes as transformers reads them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from transformers.integrations.finegrained_fp8 import Fp8Dequantize

from ktcore.errors import CheckpointError
from ktcore.weights import open_checkpoint
from ktcore.weights.ref import WeightRef

Write = Callable[..., Path]
WEIGHTS = {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16, "symmetric": True}
COMPRESSED = {
    "quant_method": "compressed-tensors",
    "format": "nvfp4-pack-quantized",
    "config_groups": {"g": {"targets": ["Linear"], "weights": WEIGHTS}},
}
MODELOPT = {"quant_method": "modelopt", "quant_algo": "NVFP4"}
ROWS, COLS, FACTOR = 24, 256, 0.0123
NEGATIVE = torch.full((ROWS, COLS // 16), -1.0).to(torch.float8_e4m3fn)


def parts(*shape: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Packed codes and positive e4m3 scales for a weight of `shape`."""
    generator = torch.Generator().manual_seed(5)
    packed = torch.randint(0, 256, (*shape[:-1], shape[-1] // 2), dtype=torch.uint8, generator=generator)
    scale = torch.rand((*shape[:-1], shape[-1] // 16), generator=generator) * 400
    return packed, scale.to(torch.float8_e4m3fn)


def expected(packed: torch.Tensor, scale: torch.Tensor, factor: float) -> torch.Tensor:
    """Scale times factor rounded to float32, as both packages have it; then the codes in float64, rounded once."""
    codes = Fp8Dequantize(None)._unpack_fp4(packed)
    each = (scale.float() * torch.tensor(factor, dtype=torch.float32)).double().repeat_interleave(16, -1)
    return (codes.double() * each).float()


def tensors_of(method: dict[str, Any], module: str, packed: torch.Tensor, scale: torch.Tensor) -> dict[str, Any]:
    if method is MODELOPT:
        factor = {f"{module}.weight_scale_2": torch.tensor(FACTOR), f"{module}.input_scale": torch.tensor(0.5)}
        return {f"{module}.weight": packed, f"{module}.weight_scale": scale, **factor}
    factor = {
        f"{module}.weight_global_scale": torch.tensor([4096.0]),
        f"{module}.input_global_scale": torch.tensor([3.0]),
    }
    return {f"{module}.weight_packed": packed, f"{module}.weight_scale": scale, **factor}


@pytest.mark.parametrize("method", [COMPRESSED, MODELOPT], ids=["compressed-tensors", "modelopt"])
def test_values(method: dict[str, Any], write_folder: Write) -> None:
    packed, scale = parts(ROWS, COLS)
    folder = write_folder(method, tensors_of(method, "a", packed, scale) | {"norm.weight": torch.ones(4)})
    with open_checkpoint(folder) as checkpoint:
        assert set(checkpoint.tensors) == {"a.weight", "norm.weight"}
        found = WeightRef.of(checkpoint, "a.weight").open(checkpoint)
        assert (found.format, found.shape) == ("NVFP4_G128", (ROWS, COLS))
        want = expected(packed, scale, FACTOR if method is MODELOPT else 1 / 4096)
        torch.testing.assert_close(found.tensor(), want, rtol=0, atol=0)


def test_experts_each_with_a_factor_of_its_own(write_folder: Write) -> None:
    tensors: dict[str, Any] = {}
    wanted = []
    for e, factor in enumerate((0.5, 0.031, 2.0)):
        packed, scale = parts(ROWS, COLS)
        packed = packed.roll(e)
        tensors |= {
            f"e.{e}.weight": packed,
            f"e.{e}.weight_scale": scale,
            f"e.{e}.weight_scale_2": torch.tensor(factor),
        }
        wanted.append(expected(packed, scale, factor))
    with open_checkpoint(write_folder(MODELOPT, tensors)) as checkpoint:
        found = WeightRef.of(checkpoint, *(f"e.{e}.weight" for e in range(3))).open(checkpoint)
        torch.testing.assert_close(found.tensor(), torch.stack(wanted), rtol=0, atol=0)
        torch.testing.assert_close(found.part(1).tensor(), wanted[1], rtol=0, atol=0)


def test_fused_experts_with_a_factor_each(write_folder: Write) -> None:
    packed, scale = parts(3, ROWS, COLS)
    factors = torch.tensor([0.5, 0.031, 2.0])
    tensors = {"e.weight": packed, "e.weight_scale": scale, "e.weight_scale_2": factors}
    with open_checkpoint(write_folder(MODELOPT, tensors)) as checkpoint:
        found = WeightRef.of(checkpoint, "e.weight").open(checkpoint).tensor()
    for e in range(3):
        torch.testing.assert_close(found[e], expected(packed[e], scale[e], float(factors[e])), rtol=0, atol=0)


def test_rows_are_factors_and_ggufs_blocks(write_folder: Write) -> None:
    packed, scale = parts(ROWS, COLS)
    with open_checkpoint(write_folder(MODELOPT, tensors_of(MODELOPT, "a", packed, scale))) as checkpoint:
        blocks = checkpoint.raw("a.weight").reshape(ROWS, -1, 76)
    assert (np.ascontiguousarray(blocks[..., :4]).view("<f4") == np.float32(FACTOR)).all()
    inner = np.ascontiguousarray(blocks[..., 4:]).reshape(ROWS, -1)
    values = gguf.quants.dequantize(inner, gguf.GGMLQuantizationType.NVFP4)
    np.testing.assert_array_equal(values, expected(packed, scale, 1.0).numpy())


def test_modelopts_fp8_and_mxfp8(write_folder: Write) -> None:
    codes = torch.randn(8, 128).to(torch.float8_e4m3fn)
    exponents = torch.randint(120, 130, (8, 4), dtype=torch.uint8)
    tensors = {"a.weight": codes, "a.weight_scale": torch.tensor(0.25), "a.input_scale": torch.tensor(1.0)}
    tensors |= {"b.weight": codes.clone(), "b.weight_scale": exponents}
    with open_checkpoint(write_folder({"quant_method": "modelopt", "quant_algo": "FP8"}, tensors)) as checkpoint:
        a, b = (WeightRef.of(checkpoint, f"{n}.weight").open(checkpoint).tensor() for n in "ab")
    torch.testing.assert_close(a, codes.float() * 0.25, rtol=0, atol=0)
    torch.testing.assert_close(b, Fp8Dequantize(None)._dequantize_one(codes, exponents, torch.float32), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"a.weight_scale_2": None}, "'a.weight_scale_2' is missing, which belongs to 'a.weight'"),
        ({"a.weight_scale_2": torch.ones(3)}, r"'a.weight_scale_2' has shape \[3\], expected one value a matrix"),
        ({"a.weight": parts(ROWS, 192)[0]}, r"'a.weight' has shape \[24, 96\]; NVFP4 needs rows of a multiple of 128"),
        ({"a.weight_scale": parts(ROWS, 128)[1]}, r"'a.weight_scale' has shape \[24, 8\], expected \[24, 16\]"),
    ],
)
def test_bad_tensors_are_named(changes: dict[str, Any], message: str, write_folder: Write) -> None:
    tensors = tensors_of(MODELOPT, "a", *parts(ROWS, COLS)) | changes
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(write_folder(MODELOPT, {name: t for name, t in tensors.items() if t is not None}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"a.weight_global_scale": torch.zeros(1)}, "'a.weight_global_scale' is zero or not finite"),
        (
            {"a.weight_scale": NEGATIVE},
            "'a.weight_scale' has scales that are",
        ),
    ],
)
def test_bad_values_are_named_when_they_are_read(changes: dict[str, Any], message: str, write_folder: Write) -> None:
    folder = write_folder(COMPRESSED, tensors_of(COMPRESSED, "a", *parts(ROWS, COLS)) | changes)
    with open_checkpoint(folder) as checkpoint, pytest.raises(CheckpointError, match=message):
        checkpoint.raw("a.weight")


def test_modelopts_tensors_without_a_configuration_are_an_error(write_folder: Write) -> None:
    with pytest.raises(CheckpointError, match=r"is of ModelOpt weights, but config.json has no"):
        open_checkpoint(write_folder(None, {"a.weight_scale_2": torch.tensor(1.0)}))
