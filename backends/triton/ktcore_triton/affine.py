"""The affine group layout: unsigned codes of 2 to 8 bits with a scale, and maybe an offset, for each group of columns.

value[r, c] = (code[r, c] - zero) * scale[r, c // group] + offset[r, c // group], in float32.

Codes lie in planes of 1, 2, 4 or 8 bits: 6-bit codes are their low four bits, then their high two. A plane goes by
spans of `span` columns, B = span * width / 8 bytes each: byte j of a span holds columns j, j + B, j + 2B …, the first
in its lowest bits, so that either half of a tile of 4-bit codes is a run of neighbouring columns.

Scales of K-quants may stay in two levels: an 8-bit integer a group and a float16 for 256 columns.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch

from ktcore.errors import BackendError
from ktcore.weights import get_format, row_bytes
from ktcore.weights.ref import Weight
from ktcore_triton.codes import FLOATS8, FORMATS, Codes, Levels, unpack

SPANS = (64, 32)
BLOCK = 256
"""Columns that share a float16 where scales are in two levels."""
PLANES = {2: (2, 0), 3: (2, 1), 4: (4, 0), 5: (4, 1), 6: (4, 2), 8: (8, 0)}
"""Bits of the low and the high plane of codes."""


@dataclass(frozen=True)
class AffineWeight:
    """A quantised matrix [rows, cols] on a device.

    Attributes:
        codes: uint8 [rows, cols * bits / 8], rows contiguous; of each row the low plane, then the high one.
        scale, offset: float16 where that loses nothing, else float32: [rows, cols / group]; offset None for none.
        bits: 2, 3, 4, 5, 6 or 8, what a code takes.
        group: columns that share a scale.
        zero: taken from every code.
        span: columns that 4-bit codes interleave over; with 8 bits only the step of kernels.
        float8: codes are e4m3fn numbers instead of integers, and zero is 0.
        over: float16 [rows, cols / 256, 1 or 2] where scale and offset are int8: scale = over[0] * scale, offset =
            -over[1] * offset; None where they are floats.
        nibbles: `scale` is uint8, the offset in the high half of its bytes.
    """

    codes: torch.Tensor
    scale: torch.Tensor
    offset: torch.Tensor | None
    bits: int
    group: int
    zero: int
    span: int
    float8: bool = False
    over: torch.Tensor | None = None
    nibbles: bool = False

    @property
    def rows(self) -> int:
        """Output features."""
        return self.codes.shape[0]

    @property
    def cols(self) -> int:
        """Input features."""
        return self.codes.shape[1] * 8 // self.bits

    @property
    def nbytes(self) -> int:
        """Bytes on the device."""
        held = (self.codes, self.scale, self.offset, self.over)
        return sum(t.numel() * t.element_size() for t in held if t is not None)

    @property
    def scales(self) -> str:
        """How scales are held: "float", "int8" or "nibbles"."""
        return "float" if self.over is None else "nibbles" if self.nibbles else "int8"

    def floats(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Scale and offset, float32 [rows, groups]."""
        if self.over is None:
            return self.scale.float(), None if self.offset is None else self.offset.float()
        over = self.over.float().repeat_interleave(BLOCK // self.group, 1)
        part, part_offset = self.scale, self.offset
        if self.nibbles:
            part, part_offset = part & 15, part >> 4
        scale = over[..., 0] * part.float()
        return scale, None if part_offset is None else -(over[..., 1] * part_offset.float())

    def values(self) -> torch.Tensor:
        """float32 [rows, cols], on the device: what kernels multiply with, for tests and for slow paths."""
        low, high = PLANES[self.bits]
        edge = self.cols * low // 8
        codes = _spread(self.codes[:, :edge], low, self.span)
        if high:
            codes = codes | (_spread(self.codes[:, edge:], high, self.span) << low)
        plain = codes.view(torch.float8_e4m3fn).float() if self.float8 else codes.float()
        scale, offset = self.floats()
        values = (plain - self.zero).view(self.rows, -1, self.group) * scale[..., None]
        if offset is not None:
            values = values + offset[..., None]
        return values.reshape(self.rows, self.cols)


def supported(weight_format: str) -> bool:
    """Whether `affine_weight` takes that format."""
    return weight_format in FORMATS


def affine_weight(
    weight_format: str,
    raw: npt.NDArray[np.uint8],
    rows: int,
    cols: int,
    device: torch.device | str = "cpu",
    *,
    dense: bool = False,
) -> AffineWeight:
    """Repack stored rows; the values stay those of `ktcore.weights.dequantize`, bit for bit.

    Columns of an ordered format stay in stored order.

    Args:
        raw: the tensor's bytes, uint8.
        dense: codes take the bits that they need, and scales in two levels stay so: hardly more than what is stored.
            Else codes take 4 or 8 bits, and scales are floats.

    Raises:
        BackendError: the format is not an affine one, or `raw` has not the bytes of [rows, cols].
        CheckpointError: a row of `cols` values is no whole number of blocks.
    """
    if not supported(weight_format):
        raise BackendError(
            f"weight format {weight_format} has no affine group layout", f"formats that have: {', '.join(FORMATS)}"
        )
    wanted = rows * row_bytes(weight_format, cols)
    if raw.size != wanted or not wanted:
        raise BackendError(f"{weight_format} [{rows}, {cols}] takes {wanted} bytes, got {raw.size}")
    return _packed(unpack(weight_format, raw.reshape(rows, -1)), device, dense)


def code_bits(weight_format: str) -> int:
    """Bits that a code of that format takes where it is not packed densely, 4 or 8."""
    block = get_format(weight_format).block_bytes
    return unpack(weight_format, np.zeros((1, block), np.uint8)).bits


def affine_bytes(weight_format: str, rows: int, cols: int, *, dense: bool = False) -> int:
    """Device bytes of a matrix in the layout; float scales of K-quants are products, which float16 seldom holds."""
    found = unpack(weight_format, np.zeros((1, row_bytes(weight_format, cols)), np.uint8))
    sample = _packed(found, "cpu", dense)
    wide = weight_format in FLOATS8 or (found.levels is not None and not dense)
    scales = sample.nbytes - sample.codes.numel()
    return rows * (sample.codes.numel() + scales * (2 if wide else 1))


def affine_bank(weight: Weight, device: torch.device | str = "cpu", *, dense: bool = False) -> AffineWeight:
    """The matrices of a stack [items, rows, cols], rows one after another; the host holds one item at a time.

    Raises:
        BackendError: the format is not an affine one.
    """
    items, rows, cols = weight.shape
    parts = (affine_weight(weight.format, weight.part(i).raw(), rows, cols, dense=dense) for i in range(items))
    first = next(parts)
    held = _Bank(first, items, device)
    for index, part in enumerate(parts, start=1):
        held.put(index, part)
    return held.weight()


class _Bank:
    """Room for all items, widened where one of them needs float32 scales, or offsets of its own."""

    def __init__(self, first: AffineWeight, items: int, device: torch.device | str) -> None:
        self._like = first
        self._codes = torch.empty((items, *first.codes.shape), dtype=torch.uint8, device=device)
        self._scale = torch.empty((items, *first.scale.shape), dtype=first.scale.dtype, device=device)
        self._offset: torch.Tensor | None = None
        self._zero = first.zero
        if first.offset is not None:
            self._offset = torch.empty((items, *first.offset.shape), dtype=first.offset.dtype, device=device)
        self._over: torch.Tensor | None = None
        if first.over is not None:
            self._over = torch.empty((items, *first.over.shape), dtype=first.over.dtype, device=device)
        self.put(0, first)

    def put(self, index: int, item: AffineWeight) -> None:
        """Take over one item."""
        if (item.offset is not None and self._offset is None) or item.zero != self._zero:
            self._shift()
        offset = item.offset
        if self._offset is not None and offset is None:
            offset = -item.zero * item.scale.float()
        self._codes[index].copy_(item.codes)
        if self._over is not None and item.over is not None:
            self._over[index].copy_(item.over)
        if item.scale.dtype == torch.float32:
            self._scale = self._scale.float()
        self._scale[index].copy_(item.scale)
        if self._offset is not None and offset is not None:
            if offset.dtype == torch.float32:
                self._offset = self._offset.float()
            self._offset[index].copy_(offset)

    def weight(self) -> AffineWeight:
        """All items as one matrix."""
        return replace(
            self._like,
            codes=self._codes.flatten(0, 1),
            scale=self._scale.flatten(0, 1),
            offset=None if self._offset is None else self._offset.flatten(0, 1),
            over=None if self._over is None else self._over.flatten(0, 1),
            zero=self._zero,
        )

    def _shift(self) -> None:
        """Items differ in what is taken from their codes: put it into offsets, -zero * scale, exact in float32."""
        if self._offset is None:
            self._offset = -self._zero * self._scale.float()
        self._zero = 0


def _packed(found: Codes, device: torch.device | str, dense: bool) -> AffineWeight:
    cols = found.codes.shape[1]
    span = next(s for s in SPANS if cols % s == 0)
    bits = found.width or found.bits if dense else found.bits
    low, high = PLANES[bits]
    codes = _plane(found.codes & np.uint8((1 << low) - 1), low, span)
    if high:
        codes = np.concatenate((codes, _plane(found.codes >> np.uint8(low), high, span)), -1)
    plain = AffineWeight(
        codes=torch.from_numpy(np.ascontiguousarray(codes)).to(device),
        scale=narrow(found.scale),
        offset=None if found.offset is None else narrow(found.offset),
        bits=bits,
        group=cols // found.scale.shape[1],
        zero=found.zero,
        span=span,
        float8=found.float8,
    )
    if dense and found.levels is not None:
        plain = _leveled(plain, found.levels)
    offset, over = plain.offset, plain.over
    return replace(
        plain,
        scale=plain.scale.to(device),
        offset=None if offset is None else offset.to(device),
        over=None if over is None else over.to(device),
    )


def _leveled(weight: AffineWeight, levels: Levels) -> AffineWeight:
    """The same with scales in two levels."""
    over = levels.over[..., None]
    if levels.over_offset is not None:
        over = np.stack((levels.over, levels.over_offset), -1)
    part, offset = torch.from_numpy(levels.part), levels.part_offset
    if levels.nibbles and offset is not None:
        part = torch.from_numpy((levels.part | (offset << np.int8(4))).view(np.uint8))
        offset = None
    return replace(
        weight,
        scale=part,
        offset=None if offset is None else torch.from_numpy(offset),
        over=torch.from_numpy(over.astype(np.float16)),
        nibbles=levels.nibbles,
    )


def _plane(codes: npt.NDArray[np.uint8], width: int, span: int) -> npt.NDArray[np.uint8]:
    """Codes [rows, cols] below 2^width as bytes [rows, cols * width / 8]."""
    parts = codes.reshape(codes.shape[0], -1, 8 // width, span * width // 8)
    packed: npt.NDArray[np.uint8] = parts[:, :, 0].copy()
    for i in range(1, 8 // width):
        packed |= parts[:, :, i] << np.uint8(i * width)
    return np.ascontiguousarray(packed.reshape(codes.shape[0], -1))


def _spread(plane: torch.Tensor, width: int, span: int) -> torch.Tensor:
    """What `_plane` was given."""
    rows = plane.shape[0]
    runs = plane.reshape(rows, -1, 1, span * width // 8)
    return torch.cat([(runs >> shift) & ((1 << width) - 1) for shift in range(0, 8, width)], 2).reshape(rows, -1)


def narrow(values: npt.NDArray[np.float32]) -> torch.Tensor:
    """float16 if every value survives it, else float32."""
    with np.errstate(over="ignore"):
        half = values.astype(np.float16)
    exact = np.array_equal(half.astype(np.float32), values, equal_nan=True)
    return torch.from_numpy(half if exact else np.ascontiguousarray(values))
