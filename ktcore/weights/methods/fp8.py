"""FP8 weights: e4m3 codes with a scale for each block of some rows and columns, each row, or the whole tensor.

The scale multiplies, although DeepSeek calls it `weight_scale_inv` (transformers, integrations/finegrained_fp8.py).
Bytes as scales are exponents, 2^(byte - 127): MXFP8 has one for 32 columns. DeepSeek-V4 calls it `scale`, and packs two
FP4 codes into each byte of its experts.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from ktcore.errors import CheckpointError
from ktcore.weights.checkpoint import Checkpoint
from ktcore.weights.converted import Bytes, LogicalWeight, Stored, logical_info
from ktcore.weights.groups import FP8_GROUPS, e4m3_values, group_formats, pack_f8
from ktcore.weights.methods.mxfp4 import PackedMxfp4Weight

SCALE_SUFFIXES = ("_scale_inv", "_scale")
SHORT_SCALE = "scale"
"""Beside `weight` in DeepSeek-V4's files."""
UNUSED_SUFFIXES = ("input_scale", "activation_scale", "input_scale_inv", "input_scale_ub")
"""Of static activation quantisation, which 8-bit weights with exact activations do not need."""
SCALE_FORMATS = ("F32", "BF16", "F16", "F8_E8M0", "U8")
EXPONENTS = ("F8_E8M0", "U8")
MX_BLOCK = (1, 32)
"""Of quant_method mxfp8, whose configuration need not say it (transformers, quantizers/auto.py)."""


def fp8_weights(checkpoint: Checkpoint, config: Mapping[str, Any]) -> Iterable[LogicalWeight]:
    """Every F8_E4M3 tensor with its scale, and every matrix of bytes with one: packed FP4.

    Raises:
        CheckpointError: a scale is missing or has a shape that divides nothing.
    """
    usual = MX_BLOCK if config.get("quant_method") == "mxfp8" else None
    block = block_size(checkpoint, config.get("weight_block_size", usual))
    for name, info in checkpoint.tensors.items():
        if info.format.startswith("F8_") and info.format != "F8_E8M0":
            yield Fp8Weight(checkpoint, name, block)
        elif info.format == "I8" and (scale := _scale_of(checkpoint, name)) in checkpoint.tensors:
            yield PackedMxfp4Weight(checkpoint, name, name, scale)


def _scale_of(checkpoint: Checkpoint, name: str) -> str:
    """The scale's name: the one that is there, else the usual one."""
    names = [name + suffix for suffix in SCALE_SUFFIXES]
    if name.endswith(".weight"):
        names.append(name.removesuffix("weight") + SHORT_SCALE)
    return next((n for n in names if n in checkpoint.tensors), names[0])


def block_size(checkpoint: Checkpoint, value: Any) -> tuple[int, int] | None:
    """Rows and columns of a scale's block; None for scales by row or tensor.

    Raises:
        CheckpointError: it is something else.
    """
    if value is None:
        return None
    good = isinstance(value, (list, tuple)) and len(value) == 2 and all(type(v) is int and v > 0 for v in value)
    if not good:
        raise CheckpointError(f"{checkpoint.path}: weight_block_size is {value!r}, needed are [rows, columns]")
    return value[0], value[1]


class Fp8Weight(LogicalWeight):
    """F8_E4M3_G128 or G32; where rows or blocks are no whole number of 32 values, a type that holds the same values.

    That is bfloat16 where scales are exponents, for they leave a code's four bits as they are, else float32.
    """

    def __init__(self, checkpoint: Checkpoint, name: str, block: tuple[int, int] | None) -> None:
        self._codes = Stored(checkpoint, name, ("F8_E4M3",))
        shape = self._codes.shape
        if len(shape) < 2:
            raise CheckpointError(f"{self._codes.where} is F8_E4M3 with shape {list(shape)}, expected a matrix")
        scale = _scale_of(checkpoint, name)
        self._scale = Stored(checkpoint, scale, SCALE_FORMATS, owner=name)
        self._block = _spread(self._scale, shape, block)
        self.info = logical_info(name, shape, block_format(shape[-1], self._block[1], self._scale.format in EXPONENTS))
        module = name.removesuffix("weight")
        unused = (module + suffix for suffix in UNUSED_SUFFIXES if name.endswith(".weight"))
        self.sources = (name, scale, *(u for u in unused if u in checkpoint.tensors))

    def rows(self, start: int, stop: int) -> Bytes:
        codes = np.asarray(self._codes.read(start, stop), dtype=np.uint8)
        cols = codes.shape[1]
        if self.info.format not in ("BF16", "F32"):
            return pack_f8(codes, self._scales(start, stop, group_formats()[self.info.format].group, cols))
        values = (e4m3_values()[codes] * self._scales(start, stop, 1, cols)).astype("<f4")
        if self.info.format == "F32":
            return values.view(np.uint8)
        bits = values.view("<u4")
        if (bits & 0xFFFF).any():
            raise CheckpointError(f"{self._codes.where} has values below 2^-133, which bfloat16 does not hold")
        return (bits >> 16).astype("<u2").view(np.uint8)

    def _scales(self, start: int, stop: int, every: int, cols: int) -> npt.NDArray[np.float32]:
        """Scales of the rows at columns 0, every, 2 every …"""
        height, width = self._block
        grid = _factors(self._scale).reshape(-1, *(self._scale.shape[-2:] if len(self._scale.shape) > 1 else (1, 1)))
        tall = self._codes.shape[-2]
        item, row = np.divmod(np.arange(start, stop), tall)
        at = grid[np.minimum(item, len(grid) - 1), row // height]
        return np.asarray(at[:, np.arange(0, cols, every) // width], dtype=np.float32)


def block_format(cols: int, width: int, exponents: bool) -> str:
    """The format of rows of `cols` codes of which `width` share a scale."""
    for group in FP8_GROUPS:
        if cols % group == 0 and (width >= cols or width % group == 0):
            return f"F8_E4M3_G{group}"
    return "BF16" if exponents else "F32"


def _factors(scale: Stored) -> npt.NDArray[np.float32]:
    if scale.format != "U8":
        return scale.floats()
    exponents = np.asarray(scale.read(), dtype=np.int32).reshape(scale.shape) - 127
    return np.asarray(np.ldexp(np.float32(1), exponents), dtype=np.float32)


def _spread(scale: Stored, shape: tuple[int, ...], block: tuple[int, int] | None) -> tuple[int, int]:
    """Rows and columns that share one scale, from the scale's shape."""
    rows, cols = shape[-2:]
    lead = shape[:-2]
    if math.prod(scale.shape) == 1:
        return rows, cols
    expected = [[*lead, rows, 1], [*lead, 1, 1]]
    if list(scale.shape) == [*lead, rows, 1]:
        return 1, cols
    if lead and list(scale.shape) == [*lead, 1, 1]:
        return rows, cols
    if block is not None:
        grid = [*lead, -(-rows // block[0]), -(-cols // block[1])]
        if list(scale.shape) == grid:
            return block
        expected = [grid, *expected]
    raise CheckpointError(
        f"{scale.where} has shape {list(scale.shape)}; for a weight of {list(shape)} expected "
        f"{' or '.join(map(str, expected))}"
    )
