"""The affine group layout: unsigned codes of 4 or 8 bits with a scale, and maybe an offset, for each group of columns.

value[r, c] = (code[r, c] - zero) * scale[r, c // group] + offset[r, c // group], in float32.

4-bit codes lie in spans of `span` columns: byte j of a span holds column j in its low and column j + span/2 in its
high bits, so that either half of a tile of bytes is a run of neighbouring columns.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch

from ktcore.errors import BackendError
from ktcore.weights import get_format, row_bytes
from ktcore.weights.ref import Weight
from ktcore_triton.codes import FLOAT8, FORMATS, Codes, unpack

SPANS = (64, 32)


@dataclass(frozen=True)
class AffineWeight:
    """A quantised matrix [rows, cols] on a device.

    Attributes:
        codes: uint8 [rows, cols * bits / 8], rows contiguous.
        scale, offset: float16 where that loses nothing, else float32: [rows, cols / group]; offset None for none.
        bits: 4 or 8, what a code takes.
        group: columns that share a scale.
        zero: taken from every code.
        span: columns that 4-bit codes interleave over; with 8 bits only the step of kernels.
        float8: codes are e4m3fn numbers instead of integers, and zero is 0.
    """

    codes: torch.Tensor
    scale: torch.Tensor
    offset: torch.Tensor | None
    bits: int
    group: int
    zero: int
    span: int
    float8: bool = False

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
        return sum(t.numel() * t.element_size() for t in (self.codes, self.scale, self.offset) if t is not None)

    def values(self) -> torch.Tensor:
        """float32 [rows, cols], on the device: what kernels multiply with, for tests and for slow paths."""
        codes = self.codes
        if self.bits == 4:
            pairs = codes.view(self.rows, -1, self.span // 2)
            codes = torch.cat((pairs & 15, pairs >> 4), -1).view(self.rows, -1)
        plain = codes.view(torch.float8_e4m3fn).float() if self.float8 else codes.float()
        values = (plain - self.zero).view(self.rows, -1, self.group) * self.scale.float()[..., None]
        if self.offset is not None:
            values = values + self.offset.float()[..., None]
        return values.reshape(self.rows, self.cols)


def supported(weight_format: str) -> bool:
    """Whether `affine_weight` takes that format."""
    return weight_format in FORMATS


def affine_weight(
    weight_format: str, raw: npt.NDArray[np.uint8], rows: int, cols: int, device: torch.device | str = "cpu"
) -> AffineWeight:
    """Repack stored rows; the values stay those of `ktcore.weights.dequantize`, bit for bit.

    Columns of an ordered format stay in stored order.

    Args:
        raw: the tensor's bytes, uint8.

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
    return _packed(unpack(weight_format, raw.reshape(rows, -1)), device)


def code_bits(weight_format: str) -> int:
    """Bits that a code of that format takes, 4 or 8."""
    block = get_format(weight_format).block_bytes
    return unpack(weight_format, np.zeros((1, block), np.uint8)).bits


def affine_bytes(weight_format: str, rows: int, cols: int) -> int:
    """Device bytes of a matrix in the layout; scales of K-quants are products, which float16 seldom holds."""
    sample = _packed(unpack(weight_format, np.zeros((1, row_bytes(weight_format, cols)), np.uint8)), "cpu")
    scales = sample.scale.numel() * (1 if sample.offset is None else 2)
    return rows * (
        sample.codes.numel() + scales * (4 if weight_format.endswith("_K") or weight_format == FLOAT8 else 2)
    )


def affine_bank(weight: Weight, device: torch.device | str = "cpu") -> AffineWeight:
    """The matrices of a stack [items, rows, cols], rows one after another; the host holds one item at a time.

    Raises:
        BackendError: the format is not an affine one.
    """
    items, rows, cols = weight.shape
    parts = (affine_weight(weight.format, weight.part(i).raw(), rows, cols) for i in range(items))
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
        self.put(0, first)

    def put(self, index: int, item: AffineWeight) -> None:
        """Take over one item."""
        if (item.offset is not None and self._offset is None) or item.zero != self._zero:
            self._shift()
        offset = item.offset
        if self._offset is not None and offset is None:
            offset = -item.zero * item.scale.float()
        self._codes[index].copy_(item.codes)
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
            zero=self._zero,
        )

    def _shift(self) -> None:
        """Items differ in what is taken from their codes: put it into offsets, -zero * scale, exact in float32."""
        if self._offset is None:
            self._offset = -self._zero * self._scale.float()
        self._zero = 0


def _packed(found: Codes, device: torch.device | str) -> AffineWeight:
    rows, cols = found.codes.shape
    span = next(s for s in SPANS if cols % s == 0)
    codes = found.codes
    if found.bits == 4:
        halves = codes.reshape(rows, -1, 2, span // 2)
        codes = (halves[:, :, 0] | (halves[:, :, 1] << np.uint8(4))).reshape(rows, -1)
    return AffineWeight(
        codes=torch.from_numpy(np.ascontiguousarray(codes)).to(device),
        scale=narrow(found.scale).to(device),
        offset=None if found.offset is None else narrow(found.offset).to(device),
        bits=found.bits,
        group=cols // found.scale.shape[1],
        zero=found.zero,
        span=span,
        float8=found.float8,
    )


def narrow(values: npt.NDArray[np.float32]) -> torch.Tensor:
    """float16 if every value survives it, else float32."""
    with np.errstate(over="ignore"):
        half = values.astype(np.float16)
    exact = np.array_equal(half.astype(np.float32), values, equal_nan=True)
    return torch.from_numpy(half if exact else np.ascontiguousarray(values))
