"""Random weights as a checkpoint stores them: valid blocks of every format, scales different from block to block."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from ktcore.weights.formats import dequantize, get_format
from ktcore.weights.groups import NVFP4_SCALED, GroupFormat, group_formats, pack_f8, pack_int, pack_nvfp4

Bytes = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class _Scales:
    """Where a block keeps its float16 scale and, if it has one, its float16 minimum."""

    scale: int
    minimum: int | None = None


_SCALES = {
    "Q4_0": _Scales(0),
    "Q4_1": _Scales(0, 2),
    "Q5_0": _Scales(0),
    "Q5_1": _Scales(0, 2),
    "Q8_0": _Scales(0),
    "Q2_K": _Scales(80, 82),
    "Q3_K": _Scales(108),
    "Q4_K": _Scales(0, 2),
    "Q5_K": _Scales(0, 2),
    "Q6_K": _Scales(208),
    "IQ2_XXS": _Scales(0),
    "IQ2_XS": _Scales(0),
    "IQ2_S": _Scales(0),
    "IQ3_XXS": _Scales(0),
    "IQ3_S": _Scales(0),
    "IQ1_S": _Scales(0),
    "IQ4_NL": _Scales(0),
    "IQ4_XS": _Scales(0),
    "TQ1_0": _Scales(52),
    "TQ2_0": _Scales(64),
    "IQ1_M": _Scales(48),
    "Q1_0": _Scales(0),
    "Q2_0": _Scales(0),
}
_EXPONENT_SCALES = {"MXFP4": (0, 1, 127), "NVFP4": (0, 4, 56)}
"""First byte and count of byte scales, and the byte that means about one."""
_TORCH = {
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
}
PLAIN_FORMATS = tuple(_TORCH)
BLOCK_FORMATS = (*_SCALES, *_EXPONENT_SCALES)
GROUP_FORMATS = ("INT4_G32", "INT4_G128", "INT8_G128", "F8_E4M3_G128", "F8_E4M3_G32", "NVFP4_G128")
"""Of GPTQ, AWQ, compressed-tensors and ModelOpt, and DeepSeek's FP8 checkpoints."""
FORMATS = PLAIN_FORMATS + BLOCK_FORMATS + GROUP_FORMATS
"""The kit's formats."""


def random_weight(name: str, shape: tuple[int, ...], std: float, rng: np.random.Generator) -> Bytes:
    """Bytes of a tensor of `shape` in format `name`, of FORMATS; values have a deviation of about `std`."""
    if name in _TORCH:
        values = rng.standard_normal(shape, dtype=np.float32) * np.float32(std)
        stored = torch.from_numpy(values).to(_TORCH[name]).view(torch.uint8)
        flat: Bytes = stored.reshape(-1).numpy()
        return flat
    fmt = get_format(name)
    count = int(np.prod(shape)) // fmt.block_size
    if name in group_formats():
        return _groups(group_formats()[name], count, std, rng).reshape(-1)
    blocks = _random_bytes(count, fmt.block_bytes, rng)
    if name in _EXPONENT_SCALES:
        _set_byte_scales(name, blocks, std, rng)
    else:
        _set_scales(name, blocks, std, rng)
    return blocks.reshape(-1)


def _random_bytes(count: int, size: int, rng: np.random.Generator) -> Bytes:
    return rng.integers(0, 256, (count, size), dtype=np.uint8)


def _groups(fmt: GroupFormat, count: int, std: float, rng: np.random.Generator) -> Bytes:
    uneven = rng.uniform(0.5, 1.5, (count, 1))
    if fmt.kind == "f8":
        values = torch.from_numpy(rng.standard_normal((count, fmt.group), dtype=np.float32) * 32)
        codes: Bytes = values.to(torch.float8_e4m3fn).view(torch.uint8).numpy()
        return pack_f8(codes, (uneven * std / 32).astype(np.float32))
    if fmt.kind == "nvfp4":
        scales = rng.integers(0x30, 0x40, (count, fmt.group // NVFP4_SCALED), dtype=np.uint8)  # 0.5 to 1.9
        e2m1 = rng.integers(0, 16, (count, fmt.group), dtype=np.uint8)
        return pack_nvfp4(e2m1, scales, (uneven[:, 0] * std / 3.5).astype(np.float32))
    levels = 1 << fmt.bits
    # even codes of n levels have a standard deviation of n / sqrt(12)
    scales = (uneven * std * np.sqrt(12) / levels).astype(np.float16).view(np.uint16)
    zeros = levels // 2 + rng.integers(-levels // 8, levels // 8 + 1, (count, 1))
    codes = _random_bytes(count, fmt.group * fmt.bits // 8, rng)
    return pack_int(codes, scales, zeros, fmt.group, bfloat16=False)


def _set_scales(name: str, blocks: Bytes, std: float, rng: np.random.Generator) -> None:
    where = _SCALES[name]
    spread, ratio = _calibration(name)
    # factors of three between neighbours, and some negative: a scale taken from the next block must show
    scale: npt.NDArray[Any] = rng.uniform(0.5, 1.5, blocks.shape[0]) * np.float64(std / spread)
    if where.minimum is None:
        scale *= rng.choice([1.0, 1.0, 1.0, -1.0], blocks.shape[0])
    _put_scale(name, blocks, where.scale, scale)
    if where.minimum is not None:
        _put_half(blocks, where.minimum, scale * ratio * rng.uniform(0.8, 1.2, blocks.shape[0]))


def _set_byte_scales(name: str, blocks: Bytes, std: float, rng: np.random.Generator) -> None:
    first, count, one = _EXPONENT_SCALES[name]
    spread, _ = _calibration(name)
    exponent = np.log2(std / spread)
    step = 1 if name == "MXFP4" else 8  # NVFP4's scale has three mantissa bits below its exponent
    drawn = one + np.rint((exponent + rng.uniform(-1, 1, (blocks.shape[0], count))) * step)
    blocks[:, first : first + count] = np.clip(drawn, 1, 126 if name == "NVFP4" else 254).astype(np.uint8)


@cache
def _calibration(name: str) -> tuple[float, float]:
    """Standard deviation of values at scale one, and the minimum (in scales) that centres them."""
    fmt = get_format(name)
    blocks = _random_bytes(256, fmt.block_bytes, np.random.default_rng(0))
    if name in _EXPONENT_SCALES:
        first, count, one = _EXPONENT_SCALES[name]
        blocks[:, first : first + count] = one
        return float(_values(name, blocks).std()), 0.0
    where = _SCALES[name]
    _put_scale(name, blocks, where.scale, np.ones(256))
    if where.minimum is None:
        return float(_values(name, blocks).std()), 0.0
    _put_half(blocks, where.minimum, np.zeros(256))
    mean = _values(name, blocks).mean()
    _put_scale(name, blocks, where.scale, np.zeros(256))
    _put_half(blocks, where.minimum, np.ones(256))
    ratio = float(-mean / _values(name, blocks).mean())
    _put_scale(name, blocks, where.scale, np.ones(256))
    _put_half(blocks, where.minimum, np.full(256, ratio))
    return float(_values(name, blocks).std()), ratio


def _values(name: str, blocks: Bytes) -> npt.NDArray[Any]:
    shape = (blocks.shape[0], get_format(name).block_size)
    return dequantize(name, blocks.reshape(-1), shape).double().numpy()


def _put_scale(name: str, blocks: Bytes, at: int, values: npt.NDArray[Any]) -> None:
    if name != "IQ1_M":
        return _put_half(blocks, at, values)
    bits = values.astype(np.float16).view(np.uint16)
    for nibble in range(4):  # each in the upper four bits of a word of small scales, the lowest first
        high = (bits >> (4 * nibble) & 15).astype(np.uint8) << 4
        blocks[:, at + 2 * nibble + 1] = blocks[:, at + 2 * nibble + 1] & 15 | high


def _put_half(blocks: Bytes, at: int, values: npt.NDArray[Any]) -> None:
    blocks[:, at : at + 2] = values.astype(np.float16).view(np.uint8).reshape(-1, 2)
