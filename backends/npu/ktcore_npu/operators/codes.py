"""Stored blocks as signed codes with a scale and an added offset a group, as torch_npu's operators take them.

value[n, k] = (code[n, k] + offset[n, k // group]) * scale[n, k // group]; Ascend adds where most subtract. Only formats
whose offsets are whole numbers, which bfloat16 holds exactly, are taken apart: a zero point z gives 8 - z, or 128 - z.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from ktcore.weights import get_format
from ktcore.weights.groups import BFLOAT16, ZERO_MASK, group_formats, scale_values, unpack_nibbles

_GGML = {"Q4_0": (4, 32), "Q8_0": (8, 32)}


@dataclass(frozen=True)
class SignedCodes:
    """Of a matrix [rows, cols], on the host.

    Attributes:
        codes: int8 [rows, cols], -8..7 with 4 bits.
        scale: float32 [rows, groups].
        offset: float32 [rows, groups], added to the codes; None where all are 0.
    """

    codes: torch.Tensor
    scale: torch.Tensor
    offset: torch.Tensor | None


def code_layout(weight_format: str) -> tuple[int, int] | None:
    """Bits of a code and values of a group; None for formats that are not taken apart."""
    if weight_format in _GGML:
        return _GGML[weight_format]
    found = group_formats().get(weight_format)
    return (found.bits, found.group) if found is not None and found.kind == "int" else None


def signed_codes(weight_format: str, raw: npt.NDArray[np.uint8], rows: int) -> SignedCodes:
    """Take stored rows apart.

    Raises:
        KeyError: `code_layout` knows no such format.
    """
    blocks = raw.reshape(rows, -1, get_format(weight_format).block_bytes)
    if weight_format == "Q8_0":
        return _made(np.ascontiguousarray(blocks[..., 2:]).view(np.int8), _half(blocks), None)
    if weight_format == "Q4_0":
        packed = blocks[..., 2:]
        halves = np.concatenate((packed & np.uint8(15), packed >> np.uint8(4)), -1)
        return _made(halves.astype(np.int8) - np.int8(8), _half(blocks), None)
    bits = group_formats()[weight_format].bits
    head = np.ascontiguousarray(blocks[..., :4]).view("<u2")
    scale = scale_values(head[..., 0], (head[..., 1] & BFLOAT16) != 0)
    middle = 8 if bits == 4 else 128
    offset = middle - (head[..., 1] & ZERO_MASK).astype(np.float32)
    if bits == 4:
        codes = unpack_nibbles(blocks[..., 4:]).astype(np.int8) - np.int8(8)
    else:
        codes = (blocks[..., 4:] ^ np.uint8(128)).view(np.int8)
    return _made(codes, scale, offset if offset.any() else None)


def _half(blocks: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
    found: npt.NDArray[np.float32] = np.ascontiguousarray(blocks[..., :2]).view("<f2")[..., 0].astype(np.float32)
    return found


def _made(
    codes: npt.NDArray[np.int8], scale: npt.NDArray[np.float32], offset: npt.NDArray[np.float32] | None
) -> SignedCodes:
    return SignedCodes(
        torch.from_numpy(np.ascontiguousarray(codes.reshape(codes.shape[0], -1))),
        torch.from_numpy(np.ascontiguousarray(scale)),
        None if offset is None else torch.from_numpy(np.ascontiguousarray(offset)),
    )
