"""Quantises to GGUF's K-quants, which the gguf package only reads: plain rounding between each group's extremes."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from gguf import GGMLQuantizationType
from gguf.quants import quantize
from numpy.typing import NDArray

F32 = NDArray[np.float32]
U8 = NDArray[np.uint8]
SUPER = 256


def quantized(values: F32, format: str) -> U8:
    """Bytes [rows, row_bytes] of values [rows, cols] in any affine GGUF format."""
    if format not in _BLOCKS:
        return np.ascontiguousarray(quantize(values, GGMLQuantizationType[format]))
    rows = values.shape[0]
    step = max(1, (1 << 22) // values.shape[1])
    parts = [_BLOCKS[format](v.reshape(-1, SUPER)) for v in np.array_split(values, range(step, rows, step))]
    return np.concatenate(parts).reshape(rows, -1)


def _affine(x: F32, group: int, bits: int, scale_bits: int) -> tuple[U8, U8, U8, U8, U8]:
    """Codes [n, 256], groups' scales and minima [n, groups], and the bytes of their two float16 factors [n, 2]."""
    g = x.reshape(len(x), -1, group)
    least = np.minimum(g.min(-1), 0)
    scale = (g.max(-1) - least) / (2**bits - 1)
    d, sc = _steps(np.maximum(scale, 0), 2**scale_bits - 1)
    dmin, m = _steps(-least, 2**scale_bits - 1)
    step, low = (d * sc)[..., None], (dmin * m)[..., None]
    codes = np.rint(np.divide(g + low, step, out=np.zeros_like(g), where=step > 0)).clip(0, 2**bits - 1)
    return _bytes(codes, len(x)), _bytes(sc, len(x)), _bytes(m, len(x)), _half(d), _half(dmin)


def _symmetric(x: F32, bits: int, scale_limit: int) -> tuple[U8, NDArray[np.int8], U8]:
    """Codes [n, 256] with their offset, groups' signed scales [n, 16], and the float16 factor's bytes [n, 2]."""
    g, top = x.reshape(len(x), -1, 16), 2 ** (bits - 1)
    peak = np.take_along_axis(g, np.abs(g).argmax(-1)[..., None], -1)[..., 0]
    scale = peak / -top  # the largest value is then the lowest code, which has no counterpart above
    d, _ = _steps(np.abs(scale), scale_limit)
    sc = np.rint(np.divide(scale, d, out=np.zeros_like(scale), where=d > 0)).clip(-scale_limit, scale_limit)
    step = (d * sc)[..., None]
    codes = np.rint(np.divide(g, step, out=np.zeros_like(g), where=step != 0)).clip(-top, top - 1) + top
    return _bytes(codes, len(x)), sc.astype(np.int8), _half(d)


def _steps(values: F32, limit: int) -> tuple[F32, F32]:
    """The float16 step [n, 1] by which values [n, groups] are at most `limit`, and the values in whole steps."""
    d = (values.max(-1, keepdims=True) / limit).astype(np.float16).astype(np.float32)
    return d, np.rint(np.divide(values, d, out=np.zeros_like(values), where=d > 0)).clip(0, limit)


def _bytes(values: F32, rows: int) -> U8:
    return values.astype(np.uint8).reshape(rows, -1)


def _half(d: F32) -> U8:
    return d.astype(np.float16).view(np.uint8)


def _fields(codes: U8, run: int, bits: int) -> U8:
    """Codes of `bits` bits: byte p of a stretch holds values p, p + run, p + 2 run … from its low bits on."""
    per = 8 // bits
    v = codes.reshape(len(codes), -1, per, run)
    shifts = (np.arange(per, dtype=np.uint8) * bits)[:, None]
    return np.bitwise_or.reduce(v << shifts, axis=2).reshape(len(codes), -1)


def _six_bits(sc: U8, m: U8) -> U8:
    """Eight scales and eight minima of 6 bits in 12 bytes, as Q4_K and Q5_K have them."""
    first = sc[:, :4] | (sc[:, 4:] >> 4 << 6)
    second = m[:, :4] | (m[:, 4:] >> 4 << 6)
    return np.concatenate([first, second, (sc[:, 4:] & 15) | (m[:, 4:] & 15) << 4], 1)


def _q2_k(x: F32) -> U8:
    codes, sc, m, d, dmin = _affine(x, 16, 2, 4)
    return np.concatenate([sc | m << 4, _fields(codes, 32, 2), d, dmin], 1)


def _q3_k(x: F32) -> U8:
    codes, signed, d = _symmetric(x, 3, 31)
    sc = (signed + np.int8(32)).view(np.uint8)
    scales = np.concatenate([(sc[:, :8] & 15) | (sc[:, 8:] & 15) << 4, _fields(sc >> 4, 4, 2)], 1)
    return np.concatenate([_fields(codes >> 2, 32, 1), _fields(codes & 3, 32, 2), scales, d], 1)


def _q4_k(x: F32) -> U8:
    codes, sc, m, d, dmin = _affine(x, 32, 4, 6)
    return np.concatenate([d, dmin, _six_bits(sc, m), _fields(codes, 32, 4)], 1)


def _q5_k(x: F32) -> U8:
    codes, sc, m, d, dmin = _affine(x, 32, 5, 6)
    return np.concatenate([d, dmin, _six_bits(sc, m), _fields(codes >> 4, 32, 1), _fields(codes & 15, 32, 4)], 1)


def _q6_k(x: F32) -> U8:
    codes, sc, d = _symmetric(x, 6, 127)
    return np.concatenate([_fields(codes & 15, 64, 4), _fields(codes >> 4, 32, 2), sc.view(np.uint8), d], 1)


_BLOCKS: dict[str, Callable[[F32], U8]] = {"Q2_K": _q2_k, "Q3_K": _q3_k, "Q4_K": _q4_k, "Q5_K": _q5_k, "Q6_K": _q6_k}
