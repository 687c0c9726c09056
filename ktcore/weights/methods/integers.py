"""What methods with integer codes share: scales by their 16 bits, and the block format that fits a group size."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ktcore.errors import CheckpointError
from ktcore.weights.checkpoint import Checkpoint
from ktcore.weights.converted import Stored
from ktcore.weights.groups import ORDERED, common_group, scale_values
from ktcore.weights.methods.overrides import Overrides

Halves = npt.NDArray[np.uint16]
SCALE_FORMATS = ("F16", "BF16", "F32")


@dataclass(frozen=True)
class ModuleScheme:
    """How one module is quantised.

    Attributes:
        bits: of a code.
        group: inputs that share a scale, -1 for whole rows; None where only the tensors tell.
        symmetric: None where nothing is said.
        desc_act: the inputs may be in activation order.
    """

    bits: int
    group: int | None
    symmetric: bool | None
    desc_act: bool


def module_schemes(
    checkpoint: Checkpoint, config: Mapping[str, Any], method: str, supported: Sequence[int], overrides: Overrides
) -> Iterator[tuple[str, ModuleScheme]]:
    """Every module that has a `qweight`, with the configuration's values or those that override them for it.

    Raises:
        CheckpointError: a module's bits are not supported, or it is to stay unquantised.
    """
    for name in checkpoint.tensors:
        if not name.endswith(".qweight"):
            continue
        module = name.removesuffix(".qweight")
        said = {**config, **overrides(module)}
        bits, group, symmetric = said.get("bits"), said.get("group_size"), said.get("sym")
        if bits == 16:
            raise CheckpointError(
                f"{checkpoint.path}: tensor '{name}' is quantised, but config.json says that '{module}' is not",
                "take config.json from the same place as the weights",
            )
        if type(bits) is not int or bits not in supported:
            raise CheckpointError(
                f"{checkpoint.path}: {method} with bits={bits!r} is not supported, which '{module}' has",
                f"supported: {' and '.join(map(str, supported))}",
            )
        yield (
            module,
            ModuleScheme(
                bits,
                group if type(group) is int else None,
                symmetric if isinstance(symmetric, bool) else None,
                bool(said.get("desc_act")),
            ),
        )


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
