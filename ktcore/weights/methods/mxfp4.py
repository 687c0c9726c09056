"""MXFP4 of gpt-oss: blocks of 32 four-bit floats and a shared exponent, re-ordered to GGUF's MXFP4 without loss.

`X_blocks` uint8 [..., rows, cols / 32, 16], byte i of a block holds values 2 i (low bits) and 2 i + 1; `X_scales` uint8
[..., rows, cols / 32]. GGUF: the exponent, then byte i holds values i (low bits) and i + 16.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from ktcore.errors import CheckpointError
from ktcore.weights.checkpoint import Checkpoint
from ktcore.weights.converted import Bytes, LogicalWeight, Stored, logical_info
from ktcore.weights.groups import unpack_nibbles

BLOCK, BLOCK_BYTES = 32, 17


def mxfp4_weights(checkpoint: Checkpoint, config: Mapping[str, Any]) -> Iterable[LogicalWeight]:
    """Every `X_blocks` with its `X_scales`, as tensor `X` [..., rows, cols].

    gpt-oss's `experts.gate_up_proj` [experts, 2 width, hidden] holds gate and up in alternating rows: take them with
    `WeightRef.pick_rows((0, 2 * width, 2))` and `pick_rows((1, 2 * width, 2))`, the biases likewise.

    Raises:
        CheckpointError: a tensor is missing or has a shape that does not fit.
    """
    for name in checkpoint.tensors:
        if name.endswith("_blocks"):
            yield Mxfp4Weight(checkpoint, name.removesuffix("_blocks"))


class Mxfp4Weight(LogicalWeight):
    """MXFP4."""

    def __init__(self, checkpoint: Checkpoint, name: str) -> None:
        self._blocks = Stored(checkpoint, f"{name}_blocks", ("U8",))
        shape = self._blocks.shape
        if len(shape) < 3 or shape[-1] != BLOCK // 2:
            raise CheckpointError(f"{self._blocks.where} has shape {list(shape)}, expected [..., rows, blocks, 16]")
        self._scales = Stored(checkpoint, f"{name}_scales", ("U8", "F8_E8M0"), shape[:-1], owner=name)
        self.info = logical_info(name, (*shape[:-2], shape[-2] * BLOCK), "MXFP4")
        self.sources = (self._blocks.name, self._scales.name)

    def rows(self, start: int, stop: int) -> Bytes:
        count = self._blocks.shape[-2]
        stored = np.asarray(self._blocks.read(start * count, stop * count), dtype=np.uint8)
        return gguf_blocks(stored, np.asarray(self._scales.read(start, stop), dtype=np.uint8))


class PackedMxfp4Weight(LogicalWeight):
    """MXFP4 in two tensors: codes uint8 or int8 [..., cols / 2], earlier ones low, exponents uint8 [..., cols / 32].

    compressed-tensors calls them `weight_packed` and `weight_scale`, DeepSeek-V4 `weight` and `scale`.
    """

    def __init__(self, checkpoint: Checkpoint, name: str, codes: str, scale: str) -> None:
        self._codes = Stored(checkpoint, codes, ("U8", "I8"))
        shape = self._codes.shape
        if len(shape) < 2 or shape[-1] % (BLOCK // 2):
            raise CheckpointError(f"{self._codes.where} has shape {list(shape)}, expected [..., cols / 2]")
        scales = (*shape[:-1], shape[-1] * 2 // BLOCK)
        self._scales = Stored(checkpoint, scale, ("U8", "F8_E8M0"), scales, owner=name)
        self.info = logical_info(name, (*shape[:-1], shape[-1] * 2), "MXFP4")
        self.sources = (self._codes.name, self._scales.name)

    def rows(self, start: int, stop: int) -> Bytes:
        stored = np.ascontiguousarray(self._codes.read(start, stop)).view(np.uint8).reshape(-1, BLOCK // 2)
        return gguf_blocks(stored, np.asarray(self._scales.read(start, stop), dtype=np.uint8))


def gguf_blocks(stored: Bytes, scales: Bytes) -> Bytes:
    """Rows [rows, blocks * 17] from blocks uint8 [rows * blocks, 16] and scales [rows, blocks]."""
    codes = unpack_nibbles(stored)
    out = np.empty((*scales.shape, BLOCK_BYTES), dtype=np.uint8)
    out[..., 0] = scales
    out[..., 1:] = (codes[:, :16] | (codes[:, 16:] << np.uint8(4))).reshape(*scales.shape, 16)
    return out.reshape(len(scales), -1)
