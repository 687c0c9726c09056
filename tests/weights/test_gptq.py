"""GPTQ and AWQ checkpoints: packed bit by bit from the formats' description, values exact against float64 formulas."""

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
AWQ_COLUMNS = (0, 2, 4, 6, 1, 3, 5, 7)


def words(values: np.ndarray, bits: int, axis: int) -> torch.Tensor:
    """Packs along an axis, the earlier value in lower bits."""
    values = np.moveaxis(values.astype(np.uint64), axis, 0)
    per_word = 32 // bits
    out = np.zeros((values.shape[0] // per_word, *values.shape[1:]), dtype=np.uint64)
    for i, value in enumerate(values):
        out[i // per_word] |= value << np.uint64(bits * (i % per_word))
    return torch.from_numpy(np.moveaxis(out, 0, axis).astype(np.uint32).view(np.int32).copy())


class Gptq:
    """A random weight [out, in], its tensors, and its values by the formula."""

    def __init__(
        self, out: int, cols: int, group: int, bits: int = 4, *, act_order: bool = False, offset: int = 1, seed: int = 0
    ) -> None:
        rng = np.random.default_rng(seed)
        groups = cols // group
        top = 2**bits
        self.codes = rng.integers(0, top, (cols, out))
        # 16 for 4 bits is allowed in version 1, where 15 is stored
        self.zeros = rng.integers(offset, top + offset, (groups, out))
        self.scales = torch.from_numpy(rng.uniform(1e-3, 1e-2, (groups, out))).half()
        self.index = np.arange(cols) // group
        if act_order:
            self.index = rng.permutation(self.index)
        spread = self.scales.double().numpy()[self.index]
        self.values = torch.from_numpy((spread * (self.codes - self.zeros[self.index])).T).float()
        self.tensors = {
            "a.qweight": words(self.codes, bits, 0),
            "a.qzeros": words(self.zeros - offset, bits, 1),
            "a.scales": self.scales,
            "a.g_idx": torch.from_numpy(self.index.astype(np.int32)),
        }


def config(bits: int = 4, group: int = 128, **more: Any) -> dict[str, Any]:
    return {"quant_method": "gptq", "bits": bits, "group_size": group, "desc_act": False, "sym": True} | more


def opened(folder: Path) -> Any:
    checkpoint = open_checkpoint(folder)
    assert set(checkpoint.tensors) == {"a.weight"}
    return WeightRef.of(checkpoint, "a.weight").open(checkpoint)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(("group", "stored"), [(32, 32), (64, 64), (128, 128), (256, 128), (384, 128), (96, 32)])
def test_gptq_values(bits: int, group: int, stored: int, write_folder: Write) -> None:
    made = Gptq(40, 768, group, bits)
    found = opened(write_folder(config(bits, group), made.tensors))
    assert (found.format, found.shape) == (f"INT{bits}_G{stored}", (40, 768))
    torch.testing.assert_close(found.tensor(), made.values, rtol=0, atol=0)
    assert found.input_order is None


def test_gptq_without_groups_or_index(write_folder: Write) -> None:
    made = Gptq(16, 192, 192)
    del made.tensors["a.g_idx"]
    found = opened(write_folder(config(group=-1), made.tensors))
    assert found.format == "INT4_G64"
    torch.testing.assert_close(found.tensor(), made.values, rtol=0, atol=0)


@pytest.mark.parametrize("bits", [4, 8])
def test_gptq_version_2_stores_zero_points_themselves(bits: int, write_folder: Write) -> None:
    made = Gptq(16, 256, 128, bits, offset=0)
    for key in ("checkpoint_format", "format"):  # GPTQModel's older and newer name of it
        found = opened(write_folder(config(bits, **{key: "gptq_v2"}), made.tensors))
        torch.testing.assert_close(found.tensor(), made.values, rtol=0, atol=0)


@pytest.mark.parametrize("bits", [4, 8])
def test_activation_order_sorts_columns_and_says_so(bits: int, write_folder: Write) -> None:
    made = Gptq(24, 512, 128, bits, act_order=True)
    found = opened(write_folder(config(bits, desc_act=True), made.tensors))
    assert found.format == f"INT{bits}_G128_ORDERED"
    torch.testing.assert_close(found.tensor(), made.values, rtol=0, atol=0)
    order = found.input_order
    assert sorted(order) == list(range(512))
    # what an implementation does: gather the input, then multiply by the rows as they are stored
    stored = dequantize(found.format, found.raw().reshape(-1), found.shape)
    torch.testing.assert_close(stored, made.values[:, torch.from_numpy(order)], rtol=0, atol=0)


def test_one_group_has_no_order(write_folder: Write) -> None:
    made = Gptq(24, 128, 128)
    found = opened(write_folder(config(desc_act=True), made.tensors))
    assert (found.format, found.input_order) == ("INT4_G128", None)
    torch.testing.assert_close(found.tensor(), made.values, rtol=0, atol=0)


def test_experts_in_activation_order_each_have_their_own(write_folder: Write) -> None:
    made = [Gptq(24, 256, 64, act_order=True, seed=e) for e in range(3)]
    tensors = {name.replace("a.", f"{e}."): t for e, m in enumerate(made) for name, t in m.tensors.items()}
    checkpoint = open_checkpoint(write_folder(config(group=64, desc_act=True), tensors))
    found = WeightRef.of(checkpoint, *(f"{e}.weight" for e in range(3))).open(checkpoint)
    want = torch.stack([m.values for m in made])
    torch.testing.assert_close(found.tensor(), want, rtol=0, atol=0)
    assert found.input_order is not None
    assert found.input_order.shape == (3, 256)
    for some in (found.subset([2, 1]), found.subset([0, 2, 1]).subset([1, 2])):
        torch.testing.assert_close(some.tensor(), want[[2, 1]], rtol=0, atol=0)
        torch.testing.assert_close(some.part(1).tensor(), want[1], rtol=0, atol=0)
    np.testing.assert_array_equal(found.subset([2]).input_order, found.input_order[[2]])


def test_some_rows_are_those_of_the_whole(write_folder: Write) -> None:
    made = Gptq(40, 256, 128)
    checkpoint = open_checkpoint(write_folder(config(), made.tensors))
    whole = checkpoint.raw("a.weight").reshape(40, -1)
    np.testing.assert_array_equal(checkpoint.rows("a.weight", 5, 31), whole[5:31])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_scales_of_other_types(dtype: torch.dtype, write_folder: Write) -> None:
    made = Gptq(16, 256, 128)
    stored = made.scales.to(dtype)
    spread = stored.double().numpy()[made.index]
    want = torch.from_numpy((spread * (made.codes - made.zeros[made.index])).T).float()
    found = opened(write_folder(config(), made.tensors | {"a.scales": stored}))
    torch.testing.assert_close(found.tensor(), want, rtol=0, atol=0)


def test_float32_scales_that_16_bits_do_not_hold_are_refused(write_folder: Write) -> None:
    made = Gptq(16, 256, 128)
    found = opened(write_folder(config(), made.tensors | {"a.scales": made.scales.float() + 1e-6}))
    with pytest.raises(CheckpointError, match=r"'a.scales' is F32 with values that neither F16 nor BF16 holds"):
        found.raw()


@pytest.mark.parametrize(
    ("method", "changes", "message"),
    [
        ({"bits": 3}, {}, "GPTQ with bits=3 is not supported"),
        ({"checkpoint_format": "marlin"}, {}, "checkpoint_format 'marlin' is not supported"),
        ({"group_size": 64}, {}, "'a.scales' has 2 groups for 256 inputs, but config.json says group_size=64"),
        ({}, {"a.scales": None}, "'a.scales' is missing, which belongs to 'a.weight'"),
        ({}, {"a.qzeros": torch.zeros(2, 3, dtype=torch.int32)}, r"'a.qzeros' has shape \[2, 3\], expected \[2, 2\]"),
        ({}, {"a.scales": torch.ones(2, 8).half()}, r"'a.scales' has shape \[2, 8\].*expected \[groups, 16\]"),
        ({}, {"a.qweight": torch.zeros(32, 16)}, "'a.qweight' is F32, expected I32"),
        ({}, {"a.g_idx": torch.zeros(255, dtype=torch.int32)}, r"'a.g_idx' has shape \[255\], expected \[256\]"),
        ({"group_size": 16}, Gptq(16, 256, 16).tensors, "groups of 16 in rows of 256 values; supported are multiples"),
    ],
)
def test_bad_gptq_is_named(method: dict[str, Any], changes: dict[str, Any], message: str, write_folder: Write) -> None:
    tensors = Gptq(16, 256, 128).tensors | changes
    folder = write_folder(config(**method), {name: t for name, t in tensors.items() if t is not None})
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(folder)


@pytest.mark.parametrize(
    ("desc_act", "index", "message"),
    [
        (True, np.zeros(256), "expected each of 2 groups 128 times"),
        (True, np.arange(256) // 64, "expected each of 2 groups 128 times"),
        (True, np.arange(256) // 128 - 1, "expected each of 2 groups 128 times"),
        (False, 1 - np.arange(256) // 128, "is not in ascending order, though config.json does not say desc_act"),
    ],
)
def test_bad_group_indices_are_named(desc_act: bool, index: np.ndarray, message: str, write_folder: Write) -> None:
    tensors = Gptq(16, 256, 128).tensors | {"a.g_idx": torch.from_numpy(index.astype(np.int32))}
    found = opened(write_folder(config(desc_act=desc_act), tensors))
    with pytest.raises(CheckpointError, match=message):
        found.raw()


def awq(out: int, cols: int, group: int) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    rng = np.random.default_rng(3)
    codes, zeros = rng.integers(0, 16, (cols, out)), rng.integers(0, 16, (cols // group, out))
    scales = torch.from_numpy(rng.uniform(1e-3, 1e-2, zeros.shape)).half()

    def pack(values: np.ndarray) -> torch.Tensor:
        packed = np.zeros((len(values), out // 8), dtype=np.uint64)
        for nibble, column in enumerate(AWQ_COLUMNS):
            packed |= values[:, column::8].astype(np.uint64) << np.uint64(4 * nibble)
        return torch.from_numpy(packed.astype(np.uint32).view(np.int32))

    index = np.arange(cols) // group
    values = torch.from_numpy((scales.double().numpy()[index] * (codes - zeros[index])).T).float()
    return {"a.qweight": pack(codes), "a.qzeros": pack(zeros), "a.scales": scales}, values


AWQ = {"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True, "version": "gemm"}


@pytest.mark.parametrize("group", [32, 64, 128, 256])
def test_awq_values(group: int, write_folder: Write) -> None:
    tensors, values = awq(40, 512, group)
    found = opened(write_folder(AWQ | {"group_size": group}, tensors))
    assert found.format == f"INT4_G{min(group, 128)}"
    torch.testing.assert_close(found.tensor(), values, rtol=0, atol=0)
    checkpoint = found._checkpoint
    for start, stop in ((3, 29), (11, 29), (16, 24), (37, 40), (9, 10)):  # words hold eight outputs each
        np.testing.assert_array_equal(checkpoint.rows("a.weight", start, stop), found.raw()[start:stop])


@pytest.mark.parametrize(
    ("method", "changes", "message"),
    [
        ({"bits": 8}, {}, "AWQ with bits=8 is not supported"),
        ({"version": "gemv"}, {}, "AWQ layout 'gemv' is not supported"),
        ({"group_size": 64}, {}, "'a.scales' has 2 groups for 256 inputs, but config.json says group_size=64"),
        ({}, {"a.qzeros": None}, "'a.qzeros' is missing, which belongs to 'a.weight'"),
        ({}, {"a.scales": torch.ones(2, 9).half()}, r"'a.scales' has shape \[2, 9\].*expected \[groups, 16\]"),
    ],
)
def test_bad_awq_is_named(method: dict[str, Any], changes: dict[str, Any], message: str, write_folder: Write) -> None:
    tensors = awq(16, 256, 128)[0] | changes
    folder = write_folder(AWQ | method, {name: t for name, t in tensors.items() if t is not None})
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(folder)


def two(made: dict[str, Gptq]) -> dict[str, torch.Tensor]:
    return {name.replace("a.", f"{module}."): t for module, m in made.items() for name, t in m.tensors.items()}


@pytest.mark.parametrize(
    ("dynamic", "bits", "group"),
    [
        ({"+:.*q_proj": {"bits": 8, "group_size": 32}}, 8, 32),
        ({"model.*q_": {"bits": 8}}, 8, 128),  # no mark is "+:"
        ({"+:q_proj": {"bits": 8}}, 4, 128),  # matched from the name's start
        ({"-:.*up": {}, "+:.*": {"group_size": 64}, "+:.*q_proj": {"bits": 8}}, 4, 64),  # the first that matches
        ({"+:.*q_proj": {"desc_act": True}}, 4, 128),
        ({}, 4, 128),
    ],
)
def test_dynamic_rules_give_modules_bits_and_groups_of_their_own(
    dynamic: dict[str, Any], bits: int, group: int, write_folder: Write
) -> None:
    name = "model.layers.0.self_attn.q_proj"
    order = bool(dynamic.get("+:.*q_proj", {}).get("desc_act"))
    made = Gptq(16, 256, group, bits, act_order=order)
    with open_checkpoint(write_folder(config(dynamic=dynamic), two({name: made}))) as checkpoint:
        found = WeightRef.of(checkpoint, f"{name}.weight").open(checkpoint)
        assert found.format == f"INT{bits}_G{group}" + "_ORDERED" * order
        torch.testing.assert_close(found.tensor(), made.values, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("dynamic", "message"),
    [
        ({"+:.*": {"bits": 3}}, "GPTQ with bits=3 is not supported, which 'a' has"),
        ({"-:a": {}}, "'a.qweight' is quantised, but config.json says that 'a' is not"),
        ({"+:.*": {"group_size": 64}}, "config.json says group_size=64"),
        ({"+:(": {"bits": 8}}, r"dynamic has '\(', which is no regular expression"),
        ({"+:a": 8}, "an object of objects by module is needed"),
    ],
)
def test_dynamic_rules_that_do_not_fit_are_named(dynamic: dict[str, Any], message: str, write_folder: Write) -> None:
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(write_folder(config(dynamic=dynamic), Gptq(16, 256, 128).tensors))


def auto_round(packing: str | None = "auto_round:auto_gptq", **more: Any) -> dict[str, Any]:
    said = {"quant_method": "auto-round", "bits": 4, "group_size": 128, "sym": True, "data_type": "int"}
    return said | ({} if packing is None else {"packing_format": packing}) | more


@pytest.mark.parametrize(
    ("packing", "offset"), [("auto_round:auto_gptq", 1), ("auto_round", 0), ("auto_round:gptqmodel", 0)]
)
@pytest.mark.parametrize("bits", [4, 8])
def test_auto_rounds_own_packing_is_gptqs(packing: str, offset: int, bits: int, write_folder: Write) -> None:
    made = Gptq(16, 256, 128, bits, offset=offset)
    negative = made.scales * torch.where(torch.arange(made.scales.numel()) % 2 == 0, 1, -1).view_as(made.scales).half()
    spread = negative.double().numpy()[made.index]
    want = torch.from_numpy((spread * (made.codes - made.zeros[made.index])).T).float()
    found = opened(write_folder(auto_round(packing, bits=bits), made.tensors | {"a.scales": negative}))
    torch.testing.assert_close(found.tensor(), want, rtol=0, atol=0)


def test_auto_rounds_awq_packing(write_folder: Write) -> None:
    tensors, values = awq(40, 512, 128)
    found = opened(write_folder(auto_round("auto_round:auto_awq", sym=False), tensors))
    torch.testing.assert_close(found.tensor(), values, rtol=0, atol=0)


def test_auto_rounds_extra_config_is_by_name_then_by_expression(write_folder: Write) -> None:
    made = {"m.1.up": Gptq(16, 256, 64, 8), "m.11.up": Gptq(16, 256, 32, 4), "m.down": Gptq(16, 256, 128)}
    extra = {"m.1.up": {"bits": 8, "group_size": 64}, r"m\.1+\.": {"group_size": 32}, "other": {"bits": 16}}
    with open_checkpoint(write_folder(auto_round(extra_config=extra), two(made))) as checkpoint:
        for module, fmt in (("m.1.up", "INT8_G64"), ("m.11.up", "INT4_G32"), ("m.down", "INT4_G128")):
            found = WeightRef.of(checkpoint, f"{module}.weight").open(checkpoint)
            assert found.format == fmt
            torch.testing.assert_close(found.tensor(), made[module].values, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (auto_round("auto_round:fp8"), "AutoRound packing_format 'auto_round:fp8' is not supported"),
        (auto_round(None), "AutoRound packing_format 'None' is not supported"),
        (auto_round(bits=2), "AutoRound with bits=2 is not supported, which 'a' has"),
        (auto_round(rotation_config={"kind": "hadamard"}), "behind a rotation"),
        (auto_round(extra_config={"a": {"bits": 16}}), "config.json says that 'a' is not"),
    ],
)
def test_what_auto_round_does_beyond_is_refused(method: dict[str, Any], message: str, write_folder: Write) -> None:
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(write_folder(method, Gptq(16, 256, 128).tensors))
