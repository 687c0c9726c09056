"""Shapes, formats and names of an expert layer's weights, and which experts are held here."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ktcore_cpu import _native

ROLES = ("gate", "up", "down")
Formats = tuple[str, str, str]
Expert = tuple[Any, Any, Any]
"""One expert's gate and up [intermediate, hidden] and down [hidden, intermediate]: float arrays, or bytes of blocks."""
Names = str | tuple[str, str, str]
"""One format for all, or gate's, up's and down's."""
MaybeNames = str | tuple[str | None, str | None, str | None] | None


@dataclass(frozen=True)
class Layout:
    """What a bank holds.

    Attributes:
        formats: of gate, up and down as packed.
        quantize: which of them are made from floats while packing.
        blocks: the source holds bytes of `formats`, not floats.
    """

    experts: int
    hidden: int
    intermediate: int
    formats: Formats
    quantize: tuple[bool, bool, bool]
    blocks: bool

    def shapes(self) -> tuple[tuple[int, int], ...]:
        """[rows, columns] of gate, up and down."""
        wide, tall = (self.intermediate, self.hidden), (self.hidden, self.intermediate)
        return wide, wide, tall


def each_role(value: str | tuple[str | None, str | None, str | None] | None, what: str) -> tuple[str | None, ...]:
    """One value for gate, up and down each from one for all or three."""
    if value is None or isinstance(value, str):
        return (value,) * 3
    if len(value) != 3:
        raise ValueError(f"{what} must be one name, or three for gate, up and down, not {value!r}")
    return tuple(value)


def check_formats(formats: Iterable[str]) -> None:
    """ValueError when a format has no native kernel."""
    known = _native.formats()
    for name in formats:
        if name not in known:
            raise ValueError(f"unknown weight format {name!r}; known: {', '.join(known)}")


def quantized_format(name: str) -> str:
    """INT4_G128 and so on from an option such as "int4_g128"; ValueError when it is none of these."""
    from ktcore.errors import CheckpointError
    from ktcore.weights.quantize import target_format

    try:
        return target_format(name)
    except CheckpointError as error:
        raise ValueError(str(error)) from error


def block_bytes(fmt: str, shape: tuple[int, int]) -> int:
    """Bytes of a stored matrix of that shape."""
    block, size = _native.formats()[fmt]
    return shape[0] * (shape[1] // block) * size


def float_layout(
    experts: int,
    held: npt.NDArray[np.int64] | None,
    hidden: int,
    intermediate: int,
    stored: tuple[str, ...],
    quantize: MaybeNames,
) -> Layout:
    """The layout of floats that are stored so, some of them to be quantised; ValueError when that cannot be."""
    wanted = each_role(quantize, "quantize")
    formats = tuple(s if q is None else quantized_format(q) for s, q in zip(stored, wanted, strict=True))
    marks = tuple(q is not None for q in wanted)
    layout = Layout(held_count(experts, held), hidden, intermediate, formats, marks, False)  # type: ignore[arg-type]
    for role, fmt, (_, cols) in zip(ROLES, formats, layout.shapes(), strict=True):
        block = _native.formats()[fmt][0]
        if cols % block:
            raise ValueError(f"{role} has rows of {cols} values, which is not a multiple of {fmt}'s {block}")
    return layout


def three_names(formats: Names) -> Formats:
    """Known formats of gate, up and down."""
    names = each_role(formats, "formats")
    check_formats(n for n in names if n is not None)
    if None in names:
        raise ValueError(f"formats must name one for each of gate, up and down, not {formats!r}")
    return names  # type: ignore[return-value]


def expert_mask(elsewhere: Any, experts: int) -> npt.NDArray[np.bool_]:
    """`elsewhere` as an array; ValueError when it is no mask of the experts."""
    mask = np.asarray(elsewhere)
    if mask.dtype != np.bool_ or mask.shape != (experts,):
        raise ValueError(f"elsewhere must be bool [{experts}], not {mask.dtype} {list(mask.shape)}")
    return mask


def held_experts(elsewhere: Any, experts: int) -> npt.NDArray[np.int64] | None:
    """Numbers of the experts that are packed here; None: all."""
    if elsewhere is None:
        return None
    held = np.flatnonzero(~expert_mask(elsewhere, experts)).astype(np.int64)
    if not held.size:
        raise ValueError("all experts are elsewhere: there is nothing to hold")
    return held


def held_count(experts: int, held: npt.NDArray[np.int64] | None) -> int:
    """How many experts are packed here."""
    return experts if held is None else len(held)
