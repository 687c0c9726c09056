"""GGUF's 1- and 2-bit blocks that the gguf package knows by size or not at all, made float32.

Q1_0 (type 41): float16 d, 128 bits from the lowest; a set bit is d, any other -d. Q2_0 (type 42): float16 d, 64 codes
of two bits from the lowest; d (code - 1), so that code 3 is 2 d (llama.cpp, ggml-quants.c).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import numpy.typing as npt

Bytes = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float32]
BLOCK_BYTES = 18


def _q1_0(raw: Bytes) -> Floats:
    scale, packed = _parts(raw)
    signs = np.unpackbits(packed, axis=1, bitorder="little").astype(np.float32) * 2 - 1
    return np.asarray(signs * scale, dtype=np.float32)


def _q2_0(raw: Bytes) -> Floats:
    scale, packed = _parts(raw)
    codes = (packed[..., None] >> np.array([0, 2, 4, 6], dtype=np.uint8)) & np.uint8(3)
    return np.asarray((codes.reshape(len(packed), -1).astype(np.float32) - 1) * scale, dtype=np.float32)


def _parts(raw: Bytes) -> tuple[Floats, Bytes]:
    """Scales [blocks, 1] and packed codes [blocks, 16]."""
    blocks = raw.reshape(-1, BLOCK_BYTES)
    scale: Floats = np.ascontiguousarray(blocks[:, :2]).view("<f2").astype(np.float32)
    return scale, np.ascontiguousarray(blocks[:, 2:])


DEQUANTIZERS: Mapping[str, Callable[[Bytes], Floats]] = {"Q1_0": _q1_0, "Q2_0": _q2_0}
"""By format: flat bytes of whole blocks -> float32 values, flat or a row a block."""
