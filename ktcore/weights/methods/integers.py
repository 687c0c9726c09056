"""What methods with integer codes share: scales by their 16 bits, and the block format that fits a group size."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from ktcore.errors import CheckpointError
from ktcore.weights.checkpoint import Checkpoint
from ktcore.weights.converted import Stored
from ktcore.weights.groups import ORDERED, common_group, scale_values

Halves = npt.NDArray[np.uint16]
SCALE_FORMATS = ("F16", "BF16", "F32")


def group_format(where: str, bits: int, group: int, cols: int, ordered: bool = False) -> tuple[str, int]:
    """The block format for a weight whose `group` consecutive values of a row share a scale, and its group size.

    Wider groups than any format's are split and their scales repeated, which loses nothing.

    Raises:
        CheckpointError: no format's group divides it.
    """
    found = common_group(group, cols)
    if found is None:
        raise CheckpointError(
            f"{where}: groups of {group} in rows of {cols} values; supported are multiples of 32, 64 or 128"
        )
    return f"INT{bits}_G{found}{ORDERED if ordered else ''}", found


def group_scales(
    checkpoint: Checkpoint, module: str, cols: int, out: int, given: int | None, inputs: str
) -> tuple[Stored, int]:
    """The tensor `scales` [groups, out] of a module whose inputs are cut into groups, and how many there are.

    Args:
        given: the configured group size, -1 for whole rows; None where the tensors alone tell.
        inputs: the module's inputs in words.

    Raises:
        CheckpointError: another shape, or other groups than configured.
    """
    scales = Stored(checkpoint, f"{module}.scales", SCALE_FORMATS, owner=f"{module}.weight")
    groups = scales.shape[0] if scales.shape else 0
    if scales.shape != (groups, out) or not groups or cols % groups:
        raise CheckpointError(
            f"{scales.where} has shape {list(scales.shape)}; for {inputs} and {out} outputs expected [groups, {out}]"
        )
    if given is not None and cols // groups != (cols if given <= 0 else min(given, cols)):
        raise CheckpointError(
            f"{scales.where} has {groups} groups for {cols} inputs, but config.json says group_size={given}"
        )
    return scales, groups


def half_scales(scale: Stored, values: npt.NDArray[Any]) -> tuple[Halves, bool]:
    """Scales, given by their bits, as 16-bit floats: the bits, and whether they are bfloat16.

    Raises:
        CheckpointError: float32 scales that 16 bits do not hold.
    """
    if scale.format in ("F16", "BF16"):
        return np.ascontiguousarray(values).view(np.uint16), scale.format == "BF16"
    wide = np.ascontiguousarray(values).view(np.float32)
    with np.errstate(over="ignore"):
        half = wide.astype(np.float16).view(np.uint16)
    upper = (wide.view(np.uint32) >> np.uint32(16)).astype(np.uint16)
    for bits, bfloat16 in ((upper, True), (half, False)):
        if np.array_equal(scale_values(bits, bfloat16), wide):
            return bits, bfloat16
    raise CheckpointError(
        f"{scale.where} is F32 with values that neither F16 nor BF16 holds exactly",
        "quantise the bf16 weights while loading instead (rule option `quantize`)",
    )


def repeated(blocks: npt.NDArray[Any], group: int, stored: int) -> npt.NDArray[Any]:
    """[rows, groups of `stored` values] -> [rows, groups of `group` values]."""
    times = stored // group
    return blocks if times == 1 else np.repeat(blocks, times, axis=1)
