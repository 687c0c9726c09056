"""Random blocks of every format, what the gguf package or torch says they are, and linear() on arrays."""

from __future__ import annotations

import numpy as np
import torch
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
    "IQ4_NL": (0,),
    "IQ4_XS": (0,),
    "IQ1_S": (0,),
    "IQ2_XXS": (0,),
    "IQ2_XS": (0,),
    "IQ2_S": (0,),
    "IQ3_XXS": (0,),
    "IQ3_S": (0,),
    "TQ1_0": (52,),
    "TQ2_0": (64,),
    "Q1_0": (0,),
    "Q2_0": (0,),
}
HALF_FIELDS |= {f"{name}_FAST": at for name, at in HALF_FIELDS.items() if f"{name}_FAST" in _native.formats()}


def random_blocks(format: str, rows: int, cols: int, seed: int = 0) -> NDArray[np.uint8]:
    """GGUF bytes [rows, row_bytes]: every code bit random, half-precision scales small and of both signs."""
    rng = np.random.default_rng(seed)
    block, size = _native.formats()[format]
    format = format.removesuffix("_FAST")  # the same blocks, packed in another way
    if block == 1:
        values = rng.standard_normal((rows, cols)).astype(np.float32)
        if format == "F32":
            return values.view(np.uint8)
        raw = quantize(values, GGMLQuantizationType[format])
        return np.ascontiguousarray(raw).view(np.uint8).reshape(rows, -1)
    raw = rng.integers(0, 256, (rows * cols // block, size), dtype=np.uint8)
    scale = (rng.standard_normal((len(raw), 1)) * 0.01).astype(np.float16)
    for at in HALF_FIELDS.get(format, ()):
        raw[:, at : at + 2] = (scale * (at + 1)).astype(np.float16).view(np.uint8)
    if format == "IQ1_M":  # the scale's four nibbles are the top ones of four words
        words = raw[:, 48:56].copy().view(np.uint16)
        bits = scale.view(np.uint16) >> np.array([0, 4, 8, 12], np.uint16)
        raw[:, 48:56] = ((words & 0xFFF) | (bits & 0xF) << 12).view(np.uint8)
    if format == "MXFP4":
        raw[:, 0] = rng.integers(0, 130, len(raw))
    if format == "NVFP4":
        raw[:, :4] &= 0x3F  # magnitudes as small as the others'
    if format == "NVFP4_G128":
        raw[:, 4:8] &= 0x3F
        raw[:, 40:44] &= 0x3F
        raw[:, :4] = scale.astype(np.float32).view(np.uint8)
    if format.startswith("INT"):
        bfloat = rng.integers(0, 2, len(raw)).astype(np.uint16)
        as_bfloat = (scale.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)
        zero = rng.integers(0, 257 if format.startswith("INT8") else 16, len(raw)).astype(np.uint16)
        raw[:, :2] = np.where(bfloat[:, None], as_bfloat, scale.view(np.uint16)).view(np.uint8)
        raw[:, 2:4] = (zero | bfloat << 15)[:, None].view(np.uint8)
    if format.startswith("F8_E4M3_G"):
        raw[(raw & 0x7F) == 0x7F] = 0x7E  # no NaN
        raw[:, :4] = scale.astype(np.float32).view(np.uint8)
    return raw.reshape(rows, -1)


def reference(format: str, raw: NDArray[np.uint8], rows: int, cols: int) -> F32:
    """What the gguf package says these bytes are; for formats that it lacks, their definition in numpy and torch."""
    format = format.removesuffix("_FAST")
    if format.startswith("INT"):
        b = raw.reshape(-1, _native.formats()[format][1])
        word, zero, codes = b[:, :2].copy().view(np.uint16), b[:, 2:4].copy().view(np.uint16), b[:, 4:]
        if format.startswith("INT4"):
            codes = np.stack([codes & 15, codes >> 4], -1).reshape(len(b), -1)
        as_bfloat = (word.astype(np.uint32) << 16).view(np.float32)
        scale = np.where(zero >> 15, as_bfloat, word.view(np.float16).astype(np.float32))
        return ((codes.astype(np.int32) - (zero & 0x7FFF)).astype(np.float32) * scale).reshape(rows, cols)
    if format.startswith("F8_E4M3_G"):
        b = raw.reshape(-1, _native.formats()[format][1])
        values = torch.from_numpy(b[:, 4:].copy()).view(torch.float8_e4m3fn).float().numpy()
        return (values * b[:, :4].copy().view(np.float32)).reshape(rows, cols)
    if format == "NVFP4_G128":  # every scale times the factor before it, rounded; then the code
        b = raw.reshape(-1, 76)
        inner = np.ascontiguousarray(b[:, 4:]).reshape(-1, 36)
        ones = np.where(np.arange(36) < 4, 0x38, inner).astype(np.uint8)  # scales of 1
        codes = np.asarray(dequantize(ones, GGMLQuantizationType.NVFP4), np.float32).reshape(-1, 8, 16)
        e4m3 = torch.from_numpy(inner[:, :4].copy()).view(torch.float8_e4m3fn).float().numpy().reshape(-1, 8)
        return (codes * (e4m3 * b[:, :4].copy().view(np.float32))[..., None]).reshape(rows, cols)
    if format in ("Q1_0", "Q2_0"):  # the package has the one by size, the other not at all: llama.cpp's ggml-common.h
        b = raw.reshape(-1, 18)
        d, packed = b[:, :2].copy().view(np.float16).astype(np.float32), b[:, 2:]
        if format == "Q1_0":
            codes = np.unpackbits(packed, axis=1, bitorder="little").astype(np.float32) * 2 - 1
        else:
            codes = np.stack([packed >> n & 3 for n in (0, 2, 4, 6)], -1).reshape(len(b), -1).astype(np.float32) - 1
        return np.asarray(codes * d, np.float32).reshape(rows, cols)
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
