"""Block formats of checkpoints other than GGUF: integer or 8-bit float codes in groups, each group's scale before it.

INT4_G*, INT8_G*: [u16 scale][u16 zero][codes]; two 4-bit codes a byte, the earlier value in the low bits. Bit 15 of
`zero` says that the scale is bfloat16, else it is float16; the rest is the zero point, 0 to 256.
value = float32(code - zero) * float32(scale). F8_E4M3_G128 and G32: [f32 scale][e4m3 codes], value = code * scale.
NVFP4_G128: [f32 factor][two of GGUF's NVFP4 blocks: four e4m3 scales, then for each of them 8 bytes, value i in the low
bits of byte i and value 8 + i in the high ones], value = e2m1 code * (scale * factor), both products rounded.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np
import numpy.typing as npt

GROUPS = (128, 64, 32)
BFLOAT16 = 0x8000
ZERO_MASK = 0x7FFF
ORDERED = "_ORDERED"
"""Suffix of formats whose columns are stored in another order than the input's (`Weight.input_order`)."""
FP8_GROUP = 128
FP8_GROUPS = (FP8_GROUP, 32)
"""Values that share a scale: of FP8 in blocks, and of MXFP8."""
NVFP4_GROUP = 128
NVFP4_SCALED = 16
"""Values of a scale."""
_E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6], dtype=np.float32)

Bytes = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float32]


@dataclass(frozen=True)
class GroupFormat:
    """Layout of one such format.

    Attributes:
        bits: of a code.
        group: values that share a scale.
        ordered: columns are permuted.
    """

    name: str
    kind: Literal["int", "f8", "nvfp4"]
    bits: int
    group: int
    ordered: bool = False

    @property
    def block_bytes(self) -> int:
        """Bytes of a block, its scales included."""
        inner = self.group // NVFP4_SCALED if self.kind == "nvfp4" else 0
        return 4 + inner + self.group * self.bits // 8


def group_formats() -> dict[str, GroupFormat]:
    """All of them by name."""
    plain = [GroupFormat(f"INT{bits}_G{group}", "int", bits, group) for bits in (4, 8) for group in sorted(GROUPS)]
    ordered = [GroupFormat(f.name + ORDERED, f.kind, f.bits, f.group, True) for f in plain]
    fp8 = [GroupFormat(f"F8_E4M3_G{group}", "f8", 8, group) for group in FP8_GROUPS]
    nvfp4 = GroupFormat(f"NVFP4_G{NVFP4_GROUP}", "nvfp4", 4, NVFP4_GROUP)
    return {f.name: f for f in (*plain, *fp8, nvfp4, *ordered)}


def common_group(*sizes: int) -> int | None:
    """The widest group that divides all of `sizes`, so that scales repeat without loss; None when none does."""
    return next((g for g in GROUPS if all(size % g == 0 for size in sizes)), None)


def pack_int(
    codes: Bytes, scales: npt.NDArray[np.uint16], zeros: npt.NDArray[np.integer] | int, group: int, *, bfloat16: bool
) -> Bytes:
    """Rows of an integer format.

    Args:
        codes: [rows, bytes], already packed as the format wants them.
        scales: [rows, blocks], 16-bit floats by their bits; bfloat16 ones if `bfloat16`, else float16.
        zeros: [rows, blocks], or one for all.
    """
    rows, blocks = scales.shape
    out = np.empty((rows, blocks, 4 + codes.shape[1] // blocks), dtype=np.uint8)
    head = np.empty((rows, blocks, 2), dtype="<u2")
    head[..., 0] = scales
    head[..., 1] = zeros
    if bfloat16:
        head[..., 1] |= BFLOAT16
    out[..., :4] = head.view(np.uint8)
    out[..., 4:] = codes.reshape(rows, blocks, -1)
    return out.reshape(rows, -1)


def pack_f8(codes: Bytes, scales: Floats) -> Bytes:
    """Rows of F8_E4M3_G128 or G32 from codes [rows, cols] and scales [rows, cols / group]."""
    rows, blocks = scales.shape
    group = codes.shape[1] // blocks
    out = np.empty((rows, blocks, 4 + group), dtype=np.uint8)
    out[..., :4] = np.ascontiguousarray(scales, dtype="<f4").view(np.uint8).reshape(rows, blocks, 4)
    out[..., 4:] = codes.reshape(rows, blocks, group)
    return out.reshape(rows, -1)


def pack_nvfp4(codes: Bytes, scales: Bytes, factors: Floats) -> Bytes:
    """Rows of NVFP4_G128.

    Args:
        codes: [rows, cols], e2m1, one a byte.
        scales: [rows, cols / 16], e4m3 by their bits.
        factors: [rows].
    """
    rows, cols = codes.shape
    groups = codes.reshape(rows, -1, 2, 4, 2, 8)  # blocks, halves, scales, low and high
    out = np.empty((rows, cols // NVFP4_GROUP, 4 + 2 * 36), dtype=np.uint8)
    out[..., :4] = np.ascontiguousarray(factors, dtype="<f4").view(np.uint8).reshape(rows, 1, 4)
    halves = out[..., 4:].reshape(rows, -1, 2, 36)
    halves[..., :4] = scales.reshape(rows, -1, 2, 4)
    halves[..., 4:] = (groups[..., 0, :] | groups[..., 1, :] << np.uint8(4)).reshape(*halves.shape[:3], 32)
    out[..., 4:] = halves.reshape(rows, -1, 72)
    return out.reshape(rows, -1)


def _nvfp4_values(blocks: Bytes) -> Floats:
    """float32 [rows, blocks, 128] of [rows, blocks, 76]."""
    factor = np.ascontiguousarray(blocks[..., :4]).view("<f4")
    halves = np.ascontiguousarray(blocks[..., 4:]).reshape(*blocks.shape[:2], 2, 36)
    scale = e4m3_values()[halves[..., :4]] * factor[..., None]
    packed = halves[..., 4:].reshape(*halves.shape[:3], 4, 8)
    codes = np.concatenate((packed & np.uint8(15), packed >> np.uint8(4)), axis=-1)
    return np.asarray((_E2M1[codes] * scale[..., None]).reshape(*blocks.shape[:2], NVFP4_GROUP), dtype=np.float32)


def pack_nibbles(codes: Bytes) -> Bytes:
    """4-bit codes [rows, cols], one a byte -> [rows, cols / 2], the earlier value in the low bits."""
    packed: Bytes = codes[:, 0::2] | (codes[:, 1::2] << np.uint8(4))
    return packed


def unpack_nibbles(packed: Bytes) -> Bytes:
    """The inverse of `pack_nibbles`, along the last axis."""
    out = np.empty((*packed.shape[:-1], 2 * packed.shape[-1]), dtype=np.uint8)
    out[..., 0::2] = packed & np.uint8(15)
    out[..., 1::2] = packed >> np.uint8(4)
    return out


def dequantize_groups(fmt: GroupFormat, raw: Bytes, rows: int) -> Floats:
    """float32 [rows, cols] of stored rows; columns stay in stored order."""
    blocks = raw.reshape(rows, -1, fmt.block_bytes)
    if fmt.kind == "f8":
        scale = np.ascontiguousarray(blocks[..., :4]).view("<f4")
        return np.asarray((e4m3_values()[blocks[..., 4:]] * scale).reshape(rows, -1), dtype=np.float32)
    if fmt.kind == "nvfp4":
        return _nvfp4_values(blocks).reshape(rows, -1)
    head = np.ascontiguousarray(blocks[..., :4]).view("<u2")
    scale = scale_values(head[..., 0], (head[..., 1] & BFLOAT16) != 0)
    codes = blocks[..., 4:] if fmt.bits == 8 else unpack_nibbles(blocks[..., 4:])
    zero = (head[..., 1] & ZERO_MASK).astype(np.float32)
    return np.asarray(((codes - zero[..., None]) * scale[..., None]).reshape(rows, -1), dtype=np.float32)


def scale_values(bits: npt.NDArray[np.uint16], bfloat16: npt.NDArray[np.bool_] | bool) -> Floats:
    """float32 of 16-bit floats given by their bits."""
    wide: Floats = (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)
    half: Floats = np.ascontiguousarray(bits).view(np.float16).astype(np.float32)
    return np.where(bfloat16, wide, half)


@lru_cache(maxsize=1)
def e4m3_values() -> Floats:
    """The 256 values of e4m3fn in float32, by code (OCP 8-bit floating point specification)."""
    import torch

    values: Floats = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).to(torch.float32).numpy()
    return values
