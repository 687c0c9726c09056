"""Takes stored blocks apart into unsigned codes, scales and offsets, one small function a format family.

Block layouts are ggml's (`ggml-common.h`, as the gguf package reads them) and those of `ktcore.weights.groups`. Scales
and offsets are rounded to float32 just where the gguf package rounds them, so that values come out the same.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from ktcore.weights import get_format
from ktcore.weights.groups import BFLOAT16, FP8_GROUP, ZERO_MASK, group_formats, scale_values, unpack_nibbles

Bytes = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float32]
FLOAT8 = f"F8_E4M3_G{FP8_GROUP}"
FLOATS8 = tuple(f.name for f in group_formats().values() if f.kind == "f8")
"""8-bit floats with scales in groups, that of 128 among them."""
Scalar = TypeVar("Scalar", bound=np.generic)


@dataclass(frozen=True)
class Levels:
    """Scales in two levels, as K-quants store them: scale = over * part, offset = -(over_offset * part_offset), exact
    in float32.

    Attributes:
        part, part_offset: int8 [rows, groups]; nibbles: both are below 16.
        over, over_offset: float32 [rows, cols / 256], which float16 holds.
    """

    part: npt.NDArray[np.int8]
    over: Floats
    part_offset: npt.NDArray[np.int8] | None = None
    over_offset: Floats | None = None
    nibbles: bool = False


@dataclass(frozen=True)
class Codes:
    """uint8 codes [rows, cols]; float32 scale and offset [rows, groups]; the zero point of all codes; 4 or 8 bits.

    float8: codes are e4m3fn numbers. width: bits that codes need, 2 to 8; 0: all of `bits`. levels: where scale and
    offset come from.
    """

    codes: Bytes
    scale: Floats
    offset: Floats | None
    zero: int
    bits: int
    float8: bool = False
    width: int = 0
    levels: Levels | None = None


def unpack(name: str, raw: Bytes) -> Codes:
    """Codes of stored rows uint8 [rows, bytes]; `name` is one of `FORMATS`."""
    blocks = raw.reshape(raw.shape[0], -1, get_format(name).block_bytes)
    groups = group_formats()
    if name in FLOATS8:
        return Codes(
            _rows(blocks[..., 4:]), np.ascontiguousarray(blocks[..., :4]).view("<f4")[..., 0], None, 0, 8, True
        )
    return _integers(blocks, groups[name].bits) if name in groups else _GGML[name](blocks)


def _integers(blocks: Bytes, bits: int) -> Codes:
    head = np.ascontiguousarray(blocks[..., :4]).view("<u2")
    scale = scale_values(head[..., 0], (head[..., 1] & BFLOAT16) != 0)
    zero = head[..., 1] & ZERO_MASK
    codes = _rows(blocks[..., 4:] if bits == 8 else unpack_nibbles(blocks[..., 4:]))
    if (zero == zero.flat[0]).all():
        return Codes(codes, scale, None, int(zero.flat[0]), bits)
    # both products and their difference have at most 20 significant bits: as exact as (code - zero) * scale
    return Codes(codes, scale, -zero.astype(np.float32) * scale, 0, bits)


def _q4(blocks: Bytes, offset: bool) -> Codes:
    codes = _low_then_high(blocks[..., 4 if offset else 2 :])
    return Codes(_rows(codes), _half(blocks, 0), _half(blocks, 2) if offset else None, 0 if offset else 8, 4)


def _q5(blocks: Bytes, offset: bool) -> Codes:
    start = 4 if offset else 2
    fifth = np.unpackbits(np.ascontiguousarray(blocks[..., start : start + 4]), axis=-1, bitorder="little")
    codes = _low_then_high(blocks[..., start + 4 :]) | (fifth << np.uint8(4))
    return Codes(_rows(codes), _half(blocks, 0), _half(blocks, 2) if offset else None, 0 if offset else 16, 8, width=5)


def _q8_0(blocks: Bytes) -> Codes:
    return Codes(_rows(blocks[..., 2:] ^ np.uint8(128)), _half(blocks, 0), None, 128, 8)


def _q2_k(blocks: Bytes) -> Codes:
    scales = blocks[..., :16]
    codes = _planes(blocks[..., 16:80], 32, (0, 2, 4, 6)) & np.uint8(3)
    scale = _half(blocks, 80)[..., None] * (scales & np.uint8(15)).astype(np.float32)
    offset = _half(blocks, 82)[..., None] * (scales >> np.uint8(4)).astype(np.float32)
    levels = Levels(
        _small(scales & np.uint8(15)), _half(blocks, 80), _small(scales >> np.uint8(4)), _half(blocks, 82), True
    )
    return Codes(_rows(codes), _rows(scale), -_rows(offset), 0, 4, width=2, levels=levels)


def _q3_k(blocks: Bytes) -> Codes:
    low = _planes(blocks[..., 32:96], 32, (0, 2, 4, 6)) & np.uint8(3)
    high = _planes(blocks[..., :32], 32, tuple(range(8))) & np.uint8(1)
    packed = blocks[..., 96:108]
    sixes = _planes(packed[..., :8], 8, (0, 4)) & np.uint8(15)
    sixes = sixes | ((_planes(packed[..., 8:], 4, (0, 2, 4, 6)) & np.uint8(3)) << np.uint8(4))
    scale = _half(blocks, 108)[..., None] * (sixes.astype(np.float32) - 32)
    levels = Levels(_small(sixes.astype(np.int8) - np.int8(32)), _half(blocks, 108))
    return Codes(_rows(low | (high << np.uint8(2))), _rows(scale), None, 4, 4, width=3, levels=levels)


def _q45_k(blocks: Bytes, five: bool) -> Codes:
    d, m, top = blocks[..., 4:8], blocks[..., 8:12], blocks[..., 12:16]
    six, four, two = np.uint8(0x3F), np.uint8(0x0F), np.uint8(0x30)
    scales = np.concatenate((d & six, (top & four) | ((d >> np.uint8(2)) & two)), -1)
    mins = np.concatenate((m & six, (top >> np.uint8(4)) | ((m >> np.uint8(2)) & two)), -1)
    codes = _planes(blocks[..., -128:], 32, (0, 4)) & four
    if five:
        codes = codes | ((_planes(blocks[..., 16:48], 32, tuple(range(8))) & np.uint8(1)) << np.uint8(4))
    scale = _half(blocks, 0)[..., None] * scales.astype(np.float32)
    offset = _half(blocks, 2)[..., None] * mins.astype(np.float32)
    levels = Levels(_small(scales), _half(blocks, 0), _small(mins), _half(blocks, 2))
    return Codes(_rows(codes), _rows(scale), -_rows(offset), 0, 8 if five else 4, width=5 if five else 4, levels=levels)


def _q6_k(blocks: Bytes) -> Codes:
    low = _planes(blocks[..., :128], 64, (0, 4)) & np.uint8(15)
    high = _planes(blocks[..., 128:192], 32, (0, 2, 4, 6)) & np.uint8(3)
    scales = np.ascontiguousarray(blocks[..., 192:208]).view(np.int8).astype(np.float32)
    scale = _half(blocks, 208)[..., None] * scales
    levels = Levels(_small(scales), _half(blocks, 208))
    return Codes(_rows(low | (high << np.uint8(4))), _rows(scale), None, 32, 8, width=6, levels=levels)


def _planes(packed: Bytes, width: int, shifts: tuple[int, ...]) -> Bytes:
    """Runs of `width` bytes, each shifted by every one of `shifts`: [rows, blocks, bytes * len(shifts)]."""
    runs = packed.reshape(*packed.shape[:2], -1, 1, width)
    shifted: Bytes = runs >> np.array(shifts, dtype=np.uint8)[:, None]
    return shifted.reshape(*packed.shape[:2], -1)


def _low_then_high(packed: Bytes) -> Bytes:
    """Codes of a block of 32: all low halves of the bytes, then all high ones."""
    return np.concatenate((packed & np.uint8(15), packed >> np.uint8(4)), -1)


def _half(blocks: Bytes, at: int) -> Floats:
    """float32 [rows, blocks] of the float16 at byte `at` of each block."""
    return np.ascontiguousarray(blocks[..., at : at + 2]).view("<f2")[..., 0].astype(np.float32)


def _rows(values: npt.NDArray[Scalar]) -> npt.NDArray[Scalar]:
    return np.ascontiguousarray(values).reshape(values.shape[0], -1)


def _small(values: npt.NDArray[Scalar]) -> npt.NDArray[np.int8]:
    return _rows(values).astype(np.int8)


_GGML: dict[str, Callable[[Bytes], Codes]] = {
    "Q4_0": lambda b: _q4(b, False),
    "Q4_1": lambda b: _q4(b, True),
    "Q5_0": lambda b: _q5(b, False),
    "Q5_1": lambda b: _q5(b, True),
    "Q8_0": _q8_0,
    "Q2_K": _q2_k,
    "Q3_K": _q3_k,
    "Q4_K": lambda b: _q45_k(b, False),
    "Q5_K": lambda b: _q45_k(b, True),
    "Q6_K": _q6_k,
}
FORMATS = (*_GGML, *(f.name for f in group_formats().values() if f.kind == "int"), *FLOATS8)
"""Weight formats with an affine group layout."""
