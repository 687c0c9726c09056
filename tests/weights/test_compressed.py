"""compressed-tensors checkpoints: packed from the description of the format, and as its own package packs them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ktcore.errors import CheckpointError
from ktcore.weights import dequantize, open_checkpoint
from ktcore.weights.ref import WeightRef

Write = Callable[..., Path]


def config(fmt: str = "pack-quantized", **weights: Any) -> dict[str, Any]:
    scheme = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32} | weights
    groups = {"group_0": {"targets": ["Linear"], "weights": scheme, "input_activations": None}}
    return {"quant_method": "compressed-tensors", "format": fmt, "config_groups": groups, "ignore": ["lm_head"]}


def groups(bits_of: dict[str, int]) -> dict[str, Any]:
    """Config groups of one target each, with so many bits."""
    weights = {"type": "int", "symmetric": True, "strategy": "group", "group_size": 32}
    return {f"group_{t}": {"targets": [t], "weights": weights | {"num_bits": b}} for t, b in bits_of.items()}


def dense(values: np.ndarray, bits: int, axis: int) -> torch.Tensor:
    """As compressed-tensors packs from 0.18 on: one stream of bits, the earlier in lower bits, cut into words."""
    values = np.moveaxis(values + 2 ** (bits - 1), axis, 0)
    out = np.zeros((-(-len(values) * bits // 32), *values.shape[1:]), dtype=np.uint64)
    for i, value in enumerate(values):
        for bit in range(bits):
            at = i * bits + bit
            out[at // 32] |= ((value >> bit) & 1).astype(np.uint64) << np.uint64(at % 32)
    return torch.from_numpy(np.moveaxis(out, 0, axis).astype(np.uint32).view(np.int32).copy())


def words(values: np.ndarray, bits: int, axis: int) -> torch.Tensor:
    """Values with offset 2^(bits - 1), packed along an axis, the earlier in lower bits; the last word padded."""
    values = np.moveaxis(values + 2 ** (bits - 1), axis, 0).astype(np.uint64)
    per_word = 32 // bits
    out = np.zeros((-(-len(values) // per_word), *values.shape[1:]), dtype=np.uint64)
    for i, value in enumerate(values):
        out[i // per_word] |= value << np.uint64(bits * (i % per_word))
    return torch.from_numpy(np.moveaxis(out, 0, axis).astype(np.uint32).view(np.int32).copy())


class Packed:
    """A random weight, its tensors and its values."""

    def __init__(
        self, shape: tuple[int, ...], group: int, bits: int = 4, *, symmetric: bool = True, pack: Any = words
    ) -> None:
        rng = np.random.default_rng(5)
        low, high = -(2 ** (bits - 1)), 2 ** (bits - 1)
        grid = (*shape[:-1], shape[-1] // group)
        self.codes = rng.integers(low, high, shape)
        self.zeros = np.zeros(grid, dtype=np.int64) if symmetric else rng.integers(low, high, grid)
        self.scales = torch.from_numpy(rng.uniform(1e-3, 1e-2, grid)).bfloat16()
        spread = self.scales.double().numpy().repeat(group, -1)
        self.values = torch.from_numpy(spread * (self.codes - self.zeros.repeat(group, -1))).float()
        self.tensors = {
            "a.weight_packed": pack(self.codes, bits, -1),
            "a.weight_scale": self.scales,
            "a.weight_shape": torch.tensor(shape),
        }
        if not symmetric:
            self.tensors["a.weight_zero_point"] = pack(self.zeros, bits, -2)


def opened(folder: Path, name: str = "a.weight") -> Any:
    checkpoint = open_checkpoint(folder)
    assert set(checkpoint.tensors) == {name}
    return WeightRef.of(checkpoint, name).open(checkpoint)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group", [32, 64, 128, 256])
def test_packed_values(bits: int, symmetric: bool, group: int, write_folder: Write) -> None:
    made = Packed((44, 512), group, bits, symmetric=symmetric)  # 44 zero points do not fill their last word
    found = opened(write_folder(config(num_bits=bits, group_size=group, symmetric=symmetric), made.tensors))
    assert (found.format, found.shape) == (f"INT{bits}_G{min(group, 128)}", (44, 512))
    torch.testing.assert_close(found.tensor(), made.values, rtol=0, atol=0)
    np.testing.assert_array_equal(found._checkpoint.rows("a.weight", 7, 43), found.raw()[7:43])


@pytest.mark.parametrize("pack", [words, dense])
@pytest.mark.parametrize("bits", [1, 2, 3, 5, 6, 7])
@pytest.mark.parametrize("symmetric", [True, False])
def test_codes_of_other_widths_in_both_ways_of_packing(
    bits: int, symmetric: bool, pack: Any, write_folder: Write
) -> None:
    made = Packed((2, 44, 160), 32, bits, symmetric=symmetric, pack=pack)
    found = opened(write_folder(config(num_bits=bits, symmetric=symmetric), made.tensors))
    assert (found.format, found.shape) == ("INT4_G32" if bits < 4 else "INT8_G32", (2, 44, 160))
    torch.testing.assert_close(found.tensor(), made.values, rtol=0, atol=0)
    np.testing.assert_array_equal(found._checkpoint.rows("a.weight", 40, 71), found.raw()[40:71])


def test_a_row_that_either_way_of_packing_fits_is_refused(write_folder: Write) -> None:
    made = Packed((8, 32), 32, 3)  # 3 words densely, 4 otherwise
    assert made.tensors["a.weight_packed"].shape == (8, 4)
    made.tensors["a.weight_packed"] = torch.zeros(8, 1, dtype=torch.int32)
    made.tensors["a.weight_shape"] = torch.tensor([8, 10])
    with pytest.raises(CheckpointError, match="10 columns of 3 bits could be either of the two ways"):
        open_checkpoint(write_folder(config(num_bits=3), made.tensors))


def test_scales_by_row_and_fused_experts(write_folder: Write) -> None:
    made = Packed((3, 20, 192), 192, symmetric=False)
    found = opened(write_folder(config(strategy="channel", group_size=None, symmetric=False), made.tensors))
    assert found.format == "INT4_G64"
    torch.testing.assert_close(found.tensor(), made.values, rtol=0, atol=0)
    torch.testing.assert_close(found.part(2).tensor(), made.values[2], rtol=0, atol=0)


def test_activation_order(write_folder: Write) -> None:
    made = Packed((12, 256), 64)
    index = torch.from_numpy(np.random.default_rng(0).permutation(np.arange(256) // 64)).int()
    spread = made.scales.double().numpy()[:, index]
    values = torch.from_numpy(spread * made.codes).float()
    method = config(group_size=64, actorder="group")
    found = opened(write_folder(method, made.tensors | {"a.weight_g_idx": index}))
    assert found.format == "INT4_G64_ORDERED"
    torch.testing.assert_close(found.tensor(), values, rtol=0, atol=0)
    stored = dequantize(found.format, found.raw().reshape(-1), found.shape)
    torch.testing.assert_close(stored, values[:, torch.from_numpy(found.input_order)], rtol=0, atol=0)


@pytest.mark.parametrize("shape", [(24, 1), (24, 4), (1,)])
@pytest.mark.parametrize("symmetric", [True, False])
def test_plain_int8(shape: tuple[int, ...], symmetric: bool, write_folder: Write) -> None:
    rng = np.random.default_rng(1)
    codes = rng.integers(-128, 128, (24, 256)).astype(np.int8)
    scale = torch.from_numpy(rng.uniform(1e-3, 1e-2, shape)).bfloat16()
    zero = np.zeros(shape, dtype=np.int8) if symmetric else rng.integers(-128, 128, shape).astype(np.int8)
    wide = [np.broadcast_to(a, (24, a.shape[-1])).repeat(256 // a.shape[-1], 1) for a in (scale.double().numpy(), zero)]
    values = torch.from_numpy(wide[0] * (codes.astype(np.int64) - wide[1])).float()
    tensors = {"a.weight": torch.from_numpy(codes), "a.weight_scale": scale}
    if not symmetric:
        tensors["a.weight_zero_point"] = torch.from_numpy(zero)
    strategy = {1: "channel", 4: "group"}[shape[-1]]
    method = config("int-quantized", num_bits=8, strategy=strategy, group_size=None, symmetric=symmetric)
    found = opened(write_folder(method, tensors))
    assert found.format == ("INT8_G64" if shape[-1] == 4 else "INT8_G128")
    torch.testing.assert_close(found.tensor(), values, rtol=0, atol=0)


def test_float_quantized_by_row_and_by_block(write_folder: Write) -> None:
    weight = torch.randn(200, 256).to(torch.float8_e4m3fn)
    for scale, extra in (
        (torch.rand(200, 1).bfloat16(), {"strategy": "channel"}),
        (torch.rand(2, 2).bfloat16(), {"strategy": "block", "block_structure": [128, 128]}),
    ):
        tensors = {"a.weight": weight, "a.weight_scale": scale}
        found = opened(write_folder(config("float-quantized", num_bits=8, type="float", **extra), tensors))
        wide = scale.double().repeat_interleave(128, 0).repeat_interleave(128, 1) if scale.shape[1] > 1 else scale
        want = (weight.double() * wide[:200].double()).float()
        torch.testing.assert_close(found.tensor(), want, rtol=0, atol=0)


def test_as_the_formats_own_package_packs_and_unpacks(write_folder: Write) -> None:
    package = pytest.importorskip("compressed_tensors.compressors.pack_quantized.base")
    quantization = pytest.importorskip("compressed_tensors.quantization")
    generator = torch.Generator().manual_seed(0)
    for bits, symmetric, group in (
        (4, True, 32),
        (4, False, 128),
        (8, True, 64),
        (8, False, 32),
        (3, False, 32),
        (6, True, 32),
    ):
        args = quantization.QuantizationArgs(
            num_bits=bits, symmetric=symmetric, strategy="group", group_size=group, type="int"
        )
        scheme = quantization.QuantizationScheme(targets=["Linear"], weights=args)
        weight = torch.randn(40, 256, generator=generator)
        scale = (torch.rand(40, 256 // group, generator=generator) * 0.1 + 0.05).half().float()
        top = 2 ** (bits - 1)
        zero = torch.zeros_like(scale) if symmetric else torch.randint(-top, top, scale.shape, generator=generator)
        stored = package.PackedQuantizationCompressor.compress(
            {"weight": weight, "weight_scale": scale, "weight_zero_point": zero.to(torch.int8)}, scheme
        )
        theirs = package.PackedQuantizationCompressor.decompress(dict(stored), scheme)["weight"]
        tensors = {f"a.{name}": tensor for name, tensor in stored.items()}
        found = opened(write_folder(config(num_bits=bits, symmetric=symmetric, group_size=group), tensors))
        torch.testing.assert_close(found.tensor(), theirs.float(), rtol=0, atol=0)


def test_groups_of_modules_with_schemes_of_their_own(write_folder: Write) -> None:
    method = config(num_bits=8, group_size=64)
    experts = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32}
    method["config_groups"]["experts"] = {"targets": ["re:.*experts.*"], "weights": experts}
    wide, narrow = Packed((8, 128), 64, 8), Packed((8, 128), 32)
    tensors = {name.replace("a.", "m.q_proj."): t for name, t in wide.tensors.items()}
    tensors |= {name.replace("a.", "m.experts.0.up."): t for name, t in narrow.tensors.items()}
    with open_checkpoint(write_folder(method, tensors)) as checkpoint:
        for name, made, fmt in (("m.q_proj", wide, "INT8_G64"), ("m.experts.0.up", narrow, "INT4_G32")):
            found = WeightRef.of(checkpoint, f"{name}.weight").open(checkpoint)
            assert found.format == fmt
            torch.testing.assert_close(found.tensor(), made.values, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("targets", "bits"),
    [
        ({"Linear": 4, "lm_head": 8}, 8),
        ({"lm_head": 8, "Linear": 4}, 8),
        ({"re:.*": 4, "lm_head": 8}, 8),
        ({"re:.*head": 8, "re:lm.*": 4}, 8),  # expressions in the order of their letters
        ({"re:zz.*": 4, "re:head": 4, "Linear": 8}, 8),  # matched from the name's start
        ({"Linear": 8, "Module": 4, "Conv2d": 4}, 8),
        ({"LinearBase": 8}, 8),
        ({"Linear": 8, "model.layers.0": 4}, 8),
    ],
)
def test_the_most_particular_target_of_a_module_decides(
    targets: dict[str, int], bits: int, write_folder: Write
) -> None:
    made = Packed((8, 128), 32, bits)
    tensors = {name.replace("a.", "lm_head."): t for name, t in made.tensors.items()}
    found = opened(write_folder(config() | {"config_groups": groups(targets)}, tensors), "lm_head.weight")
    assert found.format == f"INT{bits}_G32"
    torch.testing.assert_close(found.tensor(), made.values, rtol=0, atol=0)


@pytest.mark.parametrize("actorder", ["group", "GROUP", "dynamic", True, None, False, "weight", "static"])
@pytest.mark.parametrize("bits", [3, 4, 8])
def test_a_group_index_in_disorder_is_never_ignored(actorder: Any, bits: int, write_folder: Write) -> None:
    made = Packed((8, 128), 32, bits)
    index = np.random.default_rng(0).permutation(np.arange(128) // 32)
    tensors = made.tensors | {"a.weight_g_idx": torch.from_numpy(index.astype(np.int32))}
    found = opened(write_folder(config(num_bits=bits, actorder=actorder), tensors))
    want = made.codes * made.scales.double().numpy()[:, index]
    torch.testing.assert_close(found.tensor(), torch.from_numpy(want).float(), rtol=0, atol=0)
    assert found.format.endswith("_ORDERED")


@pytest.mark.parametrize("actorder", ["group", None])
@pytest.mark.parametrize("index", [np.arange(128) // 32, np.full(128, -1)])
def test_a_group_index_in_order_or_never_filled_in_changes_nothing(
    actorder: Any, index: np.ndarray, write_folder: Write
) -> None:
    made = Packed((8, 128), 32)
    tensors = made.tensors | {"a.weight_g_idx": torch.from_numpy(index.astype(np.int32))}
    found = opened(write_folder(config(actorder=actorder), tensors))
    torch.testing.assert_close(found.tensor(), made.values, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("method", "changes", "message"),
    [
        (config("mxfp6-pack-quantized"), {}, "format 'mxfp6-pack-quantized' is not supported"),
        (config("marlin-24"), {}, "format 'marlin-24' is not supported"),
        (config() | {"sparsity_config": {"format": "sparse-24-bitmask"}}, {}, "sparse weights"),
        (config() | {"transform_config": {"a": 1}}, {}, "behind a transform"),
        (config() | {"config_groups": {}}, {}, "has no config_groups"),
        (config(num_bits=9), {}, "int weights of 9 bits"),
        (config(num_bits=3), {}, "24 words, or 26"),
        (config(num_bits=3), {"a.weight_shape": None}, "codes of 3 bits need 'a.weight_shape', which is missing"),
        (config(actorder="sideways"), {}, "actorder 'sideways', which is not known"),
        (config() | {"config_groups": groups({"re:(": 4})}, {}, r"target 're:\(' is no regular expression"),
        (config(group_size=64), {}, "has 8 groups for 256 inputs, but config.json says group_size=64"),
        (config(), {"a.weight_scale": None}, "'a.weight_scale' is missing, which belongs to 'a.weight'"),
        (config(symmetric=False), {}, "'a.weight_zero_point' is missing"),
        (
            config(),
            {"a.weight_scale": torch.ones(3, 8)},
            r"'a.weight_scale' has shape \[3, 8\].*expected \[12, 'groups'\]",
        ),
        (config(), {"a.weight_packed": torch.zeros(12, 32)}, "'a.weight_packed' is F32, expected I32"),
    ],
)
def test_bad_checkpoints_are_named(
    method: dict[str, Any], changes: dict[str, Any], message: str, write_folder: Write
) -> None:
    tensors = Packed((12, 256), 32).tensors | changes
    folder = write_folder(method, {name: t for name, t in tensors.items() if t is not None})
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(folder)


def test_a_module_that_no_group_covers(write_folder: Write) -> None:
    method = config()
    method["config_groups"]["group_0"]["targets"] = ["re:model.*"]
    folder = write_folder(method, Packed((12, 256), 32).tensors)
    with pytest.raises(CheckpointError, match="no group of config_groups cover 'a', which is quantised"):
        open_checkpoint(folder)


def test_a_shape_that_contradicts_the_codes(write_folder: Write) -> None:
    tensors = Packed((12, 256), 32).tensors | {"a.weight_shape": torch.tensor([12, 250])}
    found = opened(write_folder(config(), tensors))
    with pytest.raises(CheckpointError, match=r"'a.weight_shape' says \[12, 250\], but 'a.weight_packed' holds"):
        found.raw()
