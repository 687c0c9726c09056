"""The affine group layout: unsigned codes of 4 or 8 bits with a scale, and maybe an offset, for each group of columns.

value[r, c] = (code[r, c] - zero) * scale[r, c // group] + offset[r, c // group], in float32.

4-bit codes lie in spans of `span` columns: byte j of a span holds column j in its low and column j + span/2 in its
high bits, so that either half of a tile of bytes is a run of neighbouring columns.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from ktcore.errors import BackendError
from ktcore.weights import row_bytes
from ktcore_triton.codes import FORMATS, Codes, unpack

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
    """

    codes: torch.Tensor
    scale: torch.Tensor
    offset: torch.Tensor | None
    bits: int
    group: int
    zero: int
    span: int

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
        values = (codes.float() - self.zero).view(self.rows, -1, self.group) * self.scale.float()[..., None]
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


def _packed(found: Codes, device: torch.device | str) -> AffineWeight:
    rows, cols = found.codes.shape
    span = next(s for s in SPANS if cols % s == 0)
    codes = found.codes
    if found.bits == 4:
        halves = codes.reshape(rows, -1, 2, span // 2)
        codes = (halves[:, :, 0] | (halves[:, :, 1] << np.uint8(4))).reshape(rows, -1)
    return AffineWeight(
        codes=torch.from_numpy(np.ascontiguousarray(codes)).to(device),
        scale=_narrow(found.scale).to(device),
        offset=None if found.offset is None else _narrow(found.offset).to(device),
        bits=found.bits,
        group=cols // found.scale.shape[1],
        zero=found.zero,
        span=span,
    )


def _narrow(values: npt.NDArray[np.float32]) -> torch.Tensor:
    """float16 if every value survives it, else float32."""
    with np.errstate(over="ignore"):
        half = values.astype(np.float16)
    exact = np.array_equal(half.astype(np.float32), values, equal_nan=True)
    return torch.from_numpy(half if exact else np.ascontiguousarray(values))
