"""References into a checkpoint: slices, steps and transposes of plain tensors are those of torch."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from ktcore.errors import CheckpointError
from ktcore.weights import open_checkpoint
from ktcore.weights.ref import WeightRef

STACK = torch.randn(3, 10, 12, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def checkpoint(write_folder: Callable[..., Path]) -> object:
    return open_checkpoint(
        write_folder(None, {"w": STACK, "h": STACK.bfloat16(), "m": STACK[0].clone(), "v": STACK[0, 0].clone()})
    )


@pytest.mark.parametrize("rows", [(0, 10, 1), (3, 8, 1), (0, 10, 2), (1, 10, 2), (1, 9, 3)])
def test_slices_with_steps(rows: tuple[int, int, int], checkpoint: object) -> None:
    ref = WeightRef.of(checkpoint, "w").pick_rows(rows)
    want = STACK[:, slice(*rows)]
    assert ref.shape == tuple(want.shape)
    assert ref.open(checkpoint).raw().flags.c_contiguous, "native packers take an address"
    torch.testing.assert_close(ref.open(checkpoint).tensor(), want, rtol=0, atol=0)
    torch.testing.assert_close(ref.open(checkpoint).part(2).tensor(), want[2], rtol=0, atol=0)
    torch.testing.assert_close(ref.open(checkpoint).subset([2, 0]).tensor(), want[[2, 0]], rtol=0, atol=0)


@pytest.mark.parametrize("name", ["w", "h"])
def test_input_major_stacks_are_transposed(name: str, checkpoint: object) -> None:
    ref = WeightRef.of(checkpoint, name).swap()
    want = (STACK if name == "w" else STACK.bfloat16().float()).transpose(1, 2)
    torch.testing.assert_close(ref.open(checkpoint).tensor(), want, rtol=0, atol=0)
    half = ref.pick_rows((6, 12, 1))
    assert half.shape == (3, 6, 10)
    torch.testing.assert_close(half.open(checkpoint).tensor(), want[:, 6:], rtol=0, atol=0)
    torch.testing.assert_close(half.open(checkpoint).part(1).tensor(), want[1, 6:], rtol=0, atol=0)


def test_several_slices_come_one_after_another(checkpoint: object) -> None:
    slices = ((7, 10, 1), (0, 6, 2), (1, 2, 1))
    order = [i for s in slices for i in range(*s)]
    ref = WeightRef.of(checkpoint, "w")
    for picked, want in (
        (ref.pick_rows(*slices), STACK[:, order]),
        (ref.pick_rows(*slices, items=True), STACK[:, :, order]),
        (ref.swap().pick_rows(*slices), STACK.transpose(1, 2)[:, order]),
    ):
        assert picked.shape == tuple(want.shape)
        torch.testing.assert_close(picked.open(checkpoint).tensor(), want, rtol=0, atol=0)
        torch.testing.assert_close(picked.open(checkpoint).part(2).tensor(), want[2], rtol=0, atol=0)
        torch.testing.assert_close(picked.open(checkpoint).subset([2, 0]).tensor(), want[[2, 0]], rtol=0, atol=0)
    with pytest.raises(AssertionError):
        torch.testing.assert_close(ref.pick_rows(*slices).open(checkpoint).tensor(), STACK[:, sorted(order)])


def test_slices_of_tensors_that_make_a_stack(checkpoint: object) -> None:
    ref = WeightRef.of(checkpoint, "m", "m").pick_rows((2, 10, 3))
    torch.testing.assert_close(ref.open(checkpoint).tensor(), STACK[[0, 0], 2:10:3], rtol=0, atol=0)
    torch.testing.assert_close(ref.open(checkpoint).part(1).tensor(), STACK[0, 2:10:3], rtol=0, atol=0)
    swapped = WeightRef.of(checkpoint, "m", "m").swap().pick_rows((2, 10, 3))
    torch.testing.assert_close(swapped.open(checkpoint).tensor(), STACK[[0, 0]].transpose(1, 2)[:, 2:10:3])


@pytest.mark.parametrize("columns", [(0, 12, 2), (1, 12, 2), (3, 9, 1)])
def test_columns_of_stacked_biases(columns: tuple[int, int, int], checkpoint: object) -> None:
    for name, whole in (("m", STACK[0]), ("v", STACK[0, 0]), ("w", STACK)):
        ref = WeightRef.of(checkpoint, name).pick_rows(columns, items=True)
        want = whole[..., slice(*columns)]
        assert ref.shape == tuple(want.shape)
        torch.testing.assert_close(ref.open(checkpoint).tensor(), want, rtol=0, atol=0)
    torch.testing.assert_close(
        WeightRef.of(checkpoint, "m").pick_rows(columns, items=True).open(checkpoint).subset([7, 2]).tensor(),
        STACK[0, [7, 2], slice(*columns)],
    )
    vector = WeightRef.of(checkpoint, "v").pick_rows(columns).open(checkpoint)
    torch.testing.assert_close(vector.tensor(), STACK[0, 0, slice(*columns)], rtol=0, atol=0)


def test_matrices_and_vectors(checkpoint: object) -> None:
    matrix = WeightRef.of(checkpoint, "m")
    torch.testing.assert_close(matrix.pick_rows((1, 9, 2)).open(checkpoint).tensor(), STACK[0, 1:9:2])
    torch.testing.assert_close(matrix.swap().open(checkpoint).tensor(), STACK[0].T)
    torch.testing.assert_close(WeightRef.of(checkpoint, "v").open(checkpoint).tensor(), STACK[0, 0])


def test_a_folded_stack_is_opened_item_by_item(checkpoint: object) -> None:
    folded = WeightRef.of(checkpoint, "m", shape=(5, 2, 12)).open(checkpoint)
    torch.testing.assert_close(folded.part(3).tensor(), STACK[0, 6:8], rtol=0, atol=0)


def test_blocks_cannot_be_transposed(write_gguf: Callable[..., Path]) -> None:
    path = write_gguf(tensors={"w": (torch.randn(4, 64).numpy(), "Q8_0")})
    with (
        open_checkpoint(path) as opened,
        pytest.raises(CheckpointError, match="'w' is Q8_0, whose values share scales: its axes"),
    ):
        WeightRef.of(opened, "w").swap()
