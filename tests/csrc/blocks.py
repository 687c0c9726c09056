"""Random GGUF blocks of every format, what the gguf package says they are, and linear() on arrays."""

from __future__ import annotations

import numpy as np
from gguf import GGMLQuantizationType
from gguf.quants import dequantize, quantize
from ktcore_cpu import _native
from numpy.typing import NDArray

F32 = NDArray[np.float32]
HALF_FIELDS = {
    "Q4_0": (0,),
    "Q4_1": (0, 2),
    "Q5_0": (0,),
    "Q5_1": (0, 2),
    "Q8_0": (0,),
    "Q2_K": (80, 82),
    "Q3_K": (108,),
    "Q4_K": (0, 2),
    "Q5_K": (0, 2),
    "Q6_K": (208,),
}


def random_blocks(format: str, rows: int, cols: int, seed: int = 0) -> NDArray[np.uint8]:
    """GGUF bytes [rows, row_bytes]: every code bit random, half-precision scales small and of both signs."""
    rng = np.random.default_rng(seed)
    block, size = _native.formats()[format]
    if block == 1:
        values = rng.standard_normal((rows, cols)).astype(np.float32)
        if format == "F32":
            return values.view(np.uint8)
        raw = quantize(values, GGMLQuantizationType[format])
        return np.ascontiguousarray(raw).view(np.uint8).reshape(rows, -1)
    raw = rng.integers(0, 256, (rows * cols // block, size), dtype=np.uint8)
    for at in HALF_FIELDS[format]:
        scale = (rng.standard_normal((len(raw), 1)) * 0.01).astype(np.float16)
        raw[:, at : at + 2] = scale.view(np.uint8)
    return raw.reshape(rows, -1)


def reference(format: str, raw: NDArray[np.uint8], rows: int, cols: int) -> F32:
    """What the gguf package says these bytes are."""
    return np.asarray(dequantize(raw, GGMLQuantizationType[format]), np.float32).reshape(rows, cols)


def run_linear(
    pool: _native.Pool, w: _native.PackedMatrix, x: F32, bias: F32 | None = None, exact: bool = False
) -> F32:
    """linear() on arrays."""
    x = np.ascontiguousarray(x)
    out = np.full((len(x), w.rows), np.nan, np.float32)
    address = 0 if bias is None else bias.ctypes.data
    _native.linear(pool, w, x.ctypes.data, out.ctypes.data, len(x), address, exact)
    return out
