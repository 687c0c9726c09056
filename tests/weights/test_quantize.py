"""Quantising while loading: error bounds from float64 math, the search never loses to min-max, odd groups survive."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from ktcore.errors import CheckpointError
from ktcore.weights import dequantize, open_checkpoint
from ktcore.weights import quantize as module
from ktcore.weights import ref as references
from ktcore.weights.quantize import Loss, quantize_rows, target_format
from ktcore.weights.ref import WeightRef

TARGETS = [f"INT{bits}_G{group}" for bits in (4, 8) for group in (32, 64, 128)]


def round_trip(values: torch.Tensor, fmt: str) -> tuple[torch.Tensor, Loss]:
    loss = Loss()
    raw = quantize_rows(values, fmt, loss, "w")
    return dequantize(fmt, raw.reshape(-1), values.shape), loss


def min_max(values: torch.Tensor, bits: int, group: int) -> torch.Tensor:
    """Plain rounding to 2^bits levels between each group's least and greatest value, in float64."""
    x = values.double().reshape(-1, group)
    low, high = x.amin(-1, keepdim=True).clamp(max=0), x.amax(-1, keepdim=True).clamp(min=0)
    scale = (high - low) / (2**bits - 1)
    zero = (-low / scale).round()
    return (((x / scale + zero).round().clamp(0, 2**bits - 1) - zero) * scale).reshape(values.shape)


@pytest.mark.parametrize("fmt", TARGETS)
@pytest.mark.parametrize("shape", ["normal", "heavy", "positive"])
def test_the_error_is_at_most_that_of_min_max(fmt: str, shape: str) -> None:
    bits, group = int(fmt[3]), int(fmt.split("G")[1])
    x = torch.randn(64, 512, generator=torch.Generator().manual_seed(0))
    x = {"normal": x, "heavy": x**3, "positive": x.abs() + 0.1}[shape] * 0.02
    found, loss = round_trip(x, fmt)
    error = (found.double() - x.double()).norm() / x.double().norm()
    baseline = (min_max(x, bits, group) - x.double()).norm() / x.double().norm()
    # 1.01: scales here are rounded to 16 bits
    assert error <= baseline * 1.01
    if bits == 4 and shape == "normal":
        assert error < baseline * 0.98, "the search is worth its time"
    assert loss.relative == pytest.approx(float(error), rel=1e-6)


@pytest.mark.parametrize("fmt", TARGETS)
@pytest.mark.parametrize("scale", [1e-30, 1e-7, 1e-3, 1.0, 1e8, 1e30])
def test_any_magnitude_keeps_its_precision(fmt: str, scale: float) -> None:
    x = torch.randn(4, 256, generator=torch.Generator().manual_seed(1)) * scale
    found, _ = round_trip(x, fmt)
    error = (found.double() - x.double()).norm() / x.double().norm()
    assert error < (0.13 if fmt[3] == "4" else 0.01)


@pytest.mark.parametrize("fmt", ["INT4_G32", "INT8_G32"])
def test_odd_groups(fmt: str) -> None:
    x = torch.zeros(5, 64)
    x[1] = 0.7
    x[2] = -0.3
    x[3, 3] = 12.0
    x[4, :32] = -0.0
    found, _ = round_trip(x, fmt)
    torch.testing.assert_close(found, x, rtol=1e-3, atol=0)
    found, _ = round_trip(torch.full((1, 64), 1e-40), fmt)
    assert found.abs().max() < 1e-37
    found, loss = round_trip(torch.zeros(2, 64), fmt)
    assert not found.any()
    assert loss.relative == 0.0


def test_values_that_are_not_finite_are_refused() -> None:
    x = torch.zeros(2, 64)
    x[1, 5] = float("nan")
    with pytest.raises(CheckpointError, match="w holds values that are not finite"):
        quantize_rows(x, "INT4_G32", Loss(), "w")


def test_chunks_do_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(37, 128)
    whole, loss = Loss(), Loss()
    expected = quantize_rows(x, "INT4_G64", whole, "w")
    monkeypatch.setattr(module, "CHUNK_VALUES", 5 * 128)
    np.testing.assert_array_equal(quantize_rows(x, "INT4_G64", loss, "w"), expected)
    assert loss.relative == pytest.approx(whole.relative)


def test_a_weight_is_quantised_expert_by_expert(write_folder: Callable[..., Path]) -> None:
    experts = [torch.randn(48, 256, generator=torch.Generator().manual_seed(e)).bfloat16() for e in range(3)]
    folder = write_folder(None, {f"{e}.weight": t for e, t in enumerate(experts)})
    with open_checkpoint(folder) as checkpoint:
        ref = WeightRef.of(checkpoint, "0.weight", "1.weight", "2.weight").quantized("INT4_G128")
        assert (ref.format, ref.stored, ref.shape) == ("INT4_G128", "BF16", (3, 48, 256))
        assert ref.nbytes == 3 * 48 * 2 * 68
        weight = ref.open(checkpoint)
        rows = [round_trip(e.float(), "INT4_G128")[0] for e in experts]
        torch.testing.assert_close(weight.part(1).tensor(), rows[1], rtol=0, atol=0)
        torch.testing.assert_close(weight.subset([2, 0]).tensor(), torch.stack(rows)[[2, 0]], rtol=0, atol=0)
        error = torch.stack([rows[i] - experts[i].float() for i in (1, 2, 0)]).norm()
        want = float(error / torch.stack([experts[i].float() for i in (1, 2, 0)]).norm())
        assert weight.loss.relative == pytest.approx(want, rel=1e-5), "parts count into their whole"


@pytest.mark.parametrize("step", [(0, 40, 1), (8, 24, 1), (1, 40, 2)])
def test_slices_of_fused_experts_are_quantised(step: tuple[int, int, int], write_folder: Callable[..., Path]) -> None:
    fused = torch.randn(3, 40, 64)
    with open_checkpoint(write_folder(None, {"w": fused})) as checkpoint:
        ref = WeightRef.of(checkpoint, "w").pick_rows(step).quantized("INT8_G64")
        want = torch.stack([round_trip(e[slice(*step)], "INT8_G64")[0] for e in fused])
        torch.testing.assert_close(ref.open(checkpoint).tensor(), want, rtol=0, atol=0)
        torch.testing.assert_close(ref.open(checkpoint).part(1).tensor(), want[1], rtol=0, atol=0)


def test_a_big_matrix_is_never_whole_in_float32(
    write_folder: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    matrix, stack = torch.randn(37, 64).bfloat16(), torch.randn(3, 10, 64)
    with open_checkpoint(write_folder(None, {"m": matrix, "s": stack})) as checkpoint:
        pieces = []

        def counted(fmt: str, raw: np.ndarray, shape: tuple[int, ...]) -> torch.Tensor:
            pieces.append(shape[0])
            return dequantize(fmt, raw, shape)

        monkeypatch.setattr(references, "PIECE_VALUES", 4 * 64)
        monkeypatch.setattr(references, "dequantize", counted)
        for name, values, expected in (("m", matrix, [4] * 9 + [1]), ("s", stack, [4, 4, 2] * 3)):
            ref = WeightRef.of(checkpoint, name).quantized("INT4_G32")
            raw = ref.open(checkpoint).raw()
            np.testing.assert_array_equal(raw, quantize_rows(values.float().reshape(-1, 64), "INT4_G32", Loss(), ""))
            assert pieces == expected
            pieces.clear()


def test_rows_must_be_whole_groups(write_folder: Callable[..., Path]) -> None:
    with open_checkpoint(write_folder(None, {"w": torch.zeros(2, 96)})) as checkpoint:
        ref = WeightRef.of(checkpoint, "w")
        with pytest.raises(CheckpointError, match=r"rows of 96 values.*INT4_G128's groups of 128\n.*groups of 32 fit"):
            ref.quantized("INT4_G128")
    with open_checkpoint(write_folder(None, {"w": torch.zeros(2, 40)})) as checkpoint:
        ref = WeightRef.of(checkpoint, "w")
        with pytest.raises(CheckpointError, match="leave it in its own format"):
            ref.quantized("INT4_G32")


@pytest.mark.parametrize("name", ["int4", "q4_0", "INT4_G128_ORDERED", "F8_E4M3_G128", 4])
def test_unknown_targets_are_named(name: str) -> None:
    with pytest.raises(CheckpointError, match=r"is unknown[\s\S]*int4_g32"):
        target_format(name)
