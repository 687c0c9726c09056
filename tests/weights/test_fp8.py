"""FP8 checkpoints: exact against float64 math on codes and scales, and against transformers' own dequantisation."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers.integrations.finegrained_fp8 import Fp8Dequantize

from ktcore.errors import CheckpointError
from ktcore.weights import open_checkpoint
from ktcore.weights.ref import WeightRef

BLOCKS = {"quant_method": "fp8", "weight_block_size": [128, 128], "activation_scheme": "dynamic"}
ROWS = {"quant_method": "fp8", "weight_block_size": None}
Write = Callable[..., Path]


def codes(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(torch.float8_e4m3fn)


def scales(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) * 1e-2 + 1e-4


def expected(weight: torch.Tensor, scale: torch.Tensor, rows: int, cols: int) -> torch.Tensor:
    """float64 product, then the one rounding to float32."""
    wide = scale.double().repeat_interleave(rows, -2).repeat_interleave(cols, -1)
    return (weight.double() * wide[..., : weight.shape[-2], : weight.shape[-1]]).float()


def opened(folder: Path, name: str = "a.weight") -> tuple[Any, Any]:
    checkpoint = open_checkpoint(folder)
    return checkpoint, WeightRef.of(checkpoint, name).open(checkpoint)


@pytest.mark.parametrize("shape", [(256, 384), (576, 256), (100, 128)])  # the last block of rows may be partial
def test_block_scales(shape: tuple[int, int], write_folder: Write) -> None:
    weight, scale = codes(*shape), scales(-(-shape[0] // 128), shape[1] // 128)
    checkpoint, found = opened(write_folder(BLOCKS, {"a.weight": weight, "a.weight_scale_inv": scale}))
    assert set(checkpoint.tensors) == {"a.weight"}
    assert (found.format, found.shape) == ("F8_E4M3_G128", shape)
    torch.testing.assert_close(found.tensor(), expected(weight, scale, 128, 128), rtol=0, atol=0)


def test_block_scales_as_transformers_dequantises_them(write_folder: Write) -> None:
    weight, scale = codes(256, 384), scales(2, 3)
    _, found = opened(write_folder(BLOCKS, {"a.weight": weight, "a.weight_scale_inv": scale}))
    theirs = Fp8Dequantize(None)._dequantize_one(weight, scale, torch.float32)
    torch.testing.assert_close(found.tensor(), theirs, rtol=0, atol=0)


def test_the_stored_rows_are_a_scale_and_128_codes(write_folder: Write) -> None:
    weight, scale = codes(200, 256), scales(2, 2)
    _, found = opened(write_folder(BLOCKS, {"a.weight": weight, "a.weight_scale_inv": scale}))
    blocks = found.raw().reshape(200, 2, 132)
    assert blocks[150, 1, :4].view("<f4")[0] == scale[1, 1].item()
    np.testing.assert_array_equal(blocks[150, 1, 4:], weight.view(torch.uint8)[150, 128:].numpy())


@pytest.mark.parametrize("shape", [(6, 1), (1,), ()])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("cols", [256, 96, 80])  # 80: no whole group, so the values come as float32
def test_scales_of_rows_and_tensors(shape: tuple[int, ...], dtype: torch.dtype, cols: int, write_folder: Write) -> None:
    weight, scale = codes(6, cols), scales(*shape).to(dtype)
    tensors = {"a.weight": weight, "a.weight_scale": scale, "a.input_scale": torch.tensor(1.0)}
    checkpoint, found = opened(write_folder(ROWS, tensors))
    assert set(checkpoint.tensors) == {"a.weight"}
    assert found.format == {256: "F8_E4M3_G128", 96: "F8_E4M3_G32", 80: "F32"}[cols]
    want = (weight.double() * scale.double().reshape(-1, 1)).float()
    torch.testing.assert_close(found.tensor(), want, rtol=0, atol=0)


def test_exponent_scales(write_folder: Write) -> None:
    scale = torch.tensor([[0.25], [2.0]]).to(torch.float8_e8m0fnu)
    weight = codes(256, 128)
    _, found = opened(write_folder(BLOCKS, {"a.weight": weight, "a.weight_scale_inv": scale}))
    torch.testing.assert_close(found.tensor(), expected(weight, scale.float(), 128, 128), rtol=0, atol=0)


@pytest.mark.parametrize("method", ["mxfp8", "fp8", "compressed-tensors"])
@pytest.mark.parametrize("bytes_", [True, False])
@pytest.mark.parametrize("shape", [(64, 96), (3, 64, 256)])
def test_mxfp8_keeps_its_codes(method: str, bytes_: bool, shape: tuple[int, ...], write_folder: Write) -> None:
    weight = codes(*shape)
    exponents = torch.randint(100, 140, (*shape[:-1], shape[-1] // 32), dtype=torch.uint8)
    scale = exponents if bytes_ else exponents.view(torch.float8_e8m0fnu)
    config: dict[str, Any] = {"quant_method": method}
    if method == "fp8":
        config |= {"weight_block_size": [1, 32], "scale_fmt": "ue8m0"}
    if method == "compressed-tensors":
        weights = {"num_bits": 8, "type": "float", "strategy": "group", "group_size": 32, "scale_dtype": "torch.uint8"}
        config |= {"format": "mxfp8-quantized", "config_groups": {"g": {"targets": ["Linear"], "weights": weights}}}
    name = "a.weight_scale" if method == "compressed-tensors" else "a.weight_scale_inv"
    checkpoint, found = opened(write_folder(config, {"a.weight": weight, name: scale}))
    assert set(checkpoint.tensors) == {"a.weight"}
    assert (found.format, found.shape) == ("F8_E4M3_G32", shape)
    theirs = Fp8Dequantize(None)._dequantize_one(weight, exponents, torch.float32)
    torch.testing.assert_close(found.tensor(), theirs, rtol=0, atol=0)


def test_exponents_that_bfloat16_cannot_hold_are_an_error(write_folder: Write) -> None:
    tensors = {
        "a.weight": torch.full((4, 16), 2.0**-9).to(torch.float8_e4m3fn),
        "a.weight_scale_inv": torch.zeros(4, 1, dtype=torch.uint8),
    }
    _, found = opened(write_folder({"quant_method": "mxfp8"}, tensors))
    with pytest.raises(CheckpointError, match=r"'a.weight' has values below 2\^-133"):
        found.tensor()


@pytest.mark.parametrize(
    ("block", "fmt"),
    [
        ((32, 32), "F8_E4M3_G32"),
        ((128, 64), "F8_E4M3_G32"),
        ((16, 16), "F32"),
        ((1, 128), "F8_E4M3_G128"),
        ((64, 256), "F8_E4M3_G128"),
    ],
)
def test_blocks_of_any_size(block: tuple[int, int], fmt: str, write_folder: Write) -> None:
    weight, scale = codes(256, 256), scales(256 // block[0], 256 // block[1])
    config = BLOCKS | {"weight_block_size": list(block)}
    _, found = opened(write_folder(config, {"a.weight": weight, "a.weight_scale_inv": scale}))
    assert found.format == fmt
    torch.testing.assert_close(found.tensor(), expected(weight, scale, *block), rtol=0, atol=0)


def test_fp4_experts_beside_fp8_as_deepseek_v4_stores_them(write_folder: Write) -> None:
    packed = torch.randint(-128, 128, (64, 128), dtype=torch.int8, generator=torch.Generator().manual_seed(3))
    exponents = torch.randint(110, 130, (64, 8), dtype=torch.uint8)
    dense, grid = codes(256, 128), torch.tensor([[0.25], [2.0]]).to(torch.float8_e8m0fnu)
    config = BLOCKS | {"scale_fmt": "ue8m0", "expert_dtype": "fp4"}
    tensors = {
        "e.w1.weight": packed,
        "e.w1.scale": exponents.view(torch.float8_e8m0fnu),
        "a.weight": dense,
        "a.scale": grid,
    }
    checkpoint, experts = opened(write_folder(config, tensors), "e.w1.weight")
    assert set(checkpoint.tensors) == {"e.w1.weight", "a.weight"}
    assert (experts.format, experts.shape) == ("MXFP4", (64, 256))
    theirs = Fp8Dequantize(None)._dequantize_one(packed, exponents, torch.float32)
    torch.testing.assert_close(experts.tensor(), theirs, rtol=0, atol=0)
    attention = WeightRef.of(checkpoint, "a.weight").open(checkpoint)
    assert attention.format == "F8_E4M3_G128"
    torch.testing.assert_close(attention.tensor(), expected(dense, grid.float(), 128, 128), rtol=0, atol=0)


def test_fused_experts_part_by_part(write_folder: Write) -> None:
    weight, scale = codes(3, 256, 256), scales(3, 2, 2)
    tensors = {"experts.gate_up_proj": weight, "experts.gate_up_proj_scale_inv": scale}
    checkpoint, found = opened(write_folder(BLOCKS, tensors), "experts.gate_up_proj")
    want = expected(weight, scale, 128, 128)
    torch.testing.assert_close(found.tensor(), want, rtol=0, atol=0)
    torch.testing.assert_close(found.part(2).tensor(), want[2], rtol=0, atol=0)
    up = found.ref.pick_rows((128, 256, 1)).open(checkpoint)
    torch.testing.assert_close(up.tensor(), want[:, 128:], rtol=0, atol=0)
    torch.testing.assert_close(up.subset([2, 0]).tensor(), want[[2, 0], 128:], rtol=0, atol=0)
    torch.testing.assert_close(up.subset([2, 0]).part(0).tensor(), want[2, 128:], rtol=0, atol=0)


@pytest.mark.parametrize("shape", [(3, 256, 1), (3, 1, 1), (1, 1, 1)])
@pytest.mark.parametrize("cols", [256, 96])
def test_fused_experts_with_scales_of_rows_and_tensors(shape: tuple[int, ...], cols: int, write_folder: Write) -> None:
    weight, scale = codes(3, 256, cols), scales(*shape)
    tensors = {"experts.down_proj": weight, "experts.down_proj_scale_inv": scale}
    _, found = opened(write_folder(ROWS, tensors), "experts.down_proj")
    want = (weight.double() * scale.double()).float()
    torch.testing.assert_close(found.tensor(), want, rtol=0, atol=0)
    torch.testing.assert_close(found.part(2).tensor(), want[2], rtol=0, atol=0)


def test_scales_of_8_bit_caches_are_left_out(write_folder: Write) -> None:
    tensors = {"a.k_proj.weight": codes(4, 128), "a.k_proj.weight_scale": scales(1), "a.k_scale": scales(1)}
    checkpoint, _ = opened(write_folder(ROWS, tensors | {"a.k_proj.output_scale": scales(1)}), "a.k_proj.weight")
    assert set(checkpoint.tensors) == {"a.k_proj.weight"}


def test_other_tensors_stay_as_they_are(write_folder: Write) -> None:
    tensors = {"a.weight": codes(4, 128), "a.weight_scale_inv": scales(1, 1), "norm.weight": torch.ones(4).bfloat16()}
    checkpoint, _ = opened(write_folder(BLOCKS, tensors))
    assert checkpoint.tensors["norm.weight"].format == "BF16"
    checkpoint.release("a.weight")
    with pytest.raises(CheckpointError, match=r"no tensor named 'a.weight_scale_inv'"):
        checkpoint.raw("a.weight_scale_inv")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"a.weight_scale_inv": None}, r"tensor 'a.weight_scale_inv' is missing, which belongs to 'a.weight'"),
        ({"a.weight_scale_inv": scales(2, 3)}, r"scale_inv' has shape \[2, 3\]; .*\[256, 256\] expected \[2, 2\]"),
        ({"a.weight_scale_inv": torch.ones(2, 2, dtype=torch.int32)}, r"scale_inv' is I32, expected F32 or BF16"),
        ({"a.weight": codes(256, 256).to(torch.float8_e5m2)}, r"tensor 'a.weight' is F8_E5M2, expected F8_E4M3"),
    ],
)
def test_bad_tensors_are_named(changes: dict[str, Any], message: str, write_folder: Write) -> None:
    tensors = {"a.weight": codes(256, 256), "a.weight_scale_inv": scales(2, 2)} | changes
    folder = write_folder(BLOCKS, {name: t for name, t in tensors.items() if t is not None})
    with pytest.raises(CheckpointError, match=message) as caught:
        open_checkpoint(folder)
    assert str(folder) in str(caught.value)


@pytest.mark.parametrize(
    "block", [[128], "128x128", [128, 0], [0, 128], [128, 128, 128], [128.0, 128], ["128", 128], 128]
)
def test_block_sizes_that_are_not_supported(block: Any, write_folder: Write) -> None:
    folder = write_folder(BLOCKS | {"weight_block_size": block}, {"a.weight": codes(4, 128)})
    with pytest.raises(CheckpointError, match="weight_block_size is"):
        open_checkpoint(folder)


@pytest.mark.parametrize("method", ["bitsandbytes", "quanto", None, 3, "eetq"])
def test_unknown_methods_are_refused_by_name(method: Any, write_folder: Write) -> None:
    folder = write_folder({"quant_method": method}, {"a.weight": torch.zeros(2, 2)})
    with pytest.raises(CheckpointError, match=rf"quantised with '{method}' are not supported[\s\S]*gptq"):
        open_checkpoint(folder)


def test_a_method_without_its_tensors_is_an_error(write_folder: Write) -> None:
    with pytest.raises(CheckpointError, match=r"config.json says that weights are quantised with 'fp8', but none is"):
        open_checkpoint(write_folder(BLOCKS, {"a.weight": torch.zeros(2, 2)}))


def test_quantised_tensors_without_a_configuration_are_an_error(write_folder: Write) -> None:
    folder = write_folder(None, {"a.weight": codes(128, 128), "a.weight_scale_inv": scales(1, 1)})
    with pytest.raises(CheckpointError, match=r"'a.weight_scale_inv' is of FP8 weights, but config.json has no"):
        open_checkpoint(folder)
