"""Quantises float weights to groups of 4- or 8-bit integers: round to nearest, with scale and zero point searched."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from ktcore.errors import CheckpointError
from ktcore.weights.groups import GroupFormat, group_formats, pack_int, pack_nibbles

SHRINK = {4: (1.0, 0.95, 0.9, 0.85, 0.8, 0.74, 0.68), 8: (1.0,)}
"""Fractions of a group's range that are tried: with 16 levels, clipping the extremes often costs less than it saves."""
CHUNK_VALUES = 1 << 19
"""Quantised at a time: what the processor's cache holds."""
F16_LEAST, F16_MOST = 2.0**-14, 65504.0
LEAST_SCALE = 2.0**-126  # below, its reciprocal would overflow


@dataclass
class Loss:
    """Squared error and squared values of all that was quantised, in float64 sums."""

    error: float = 0.0
    value: float = 0.0

    @property
    def relative(self) -> float:
        """Root mean square error over root mean square value; 0 when nothing was quantised."""
        return math.sqrt(self.error / self.value) if self.value else 0.0

    def add(self, other: Loss) -> None:
        """Count another one in."""
        self.error += other.error
        self.value += other.value


def target_format(name: str) -> str:
    """The format that an option such as "int4_g128" names.

    Raises:
        CheckpointError: it names none.
    """
    known = [f.name for f in group_formats().values() if f.kind == "int" and not f.ordered]
    if not isinstance(name, str) or name.upper() not in known:
        raise CheckpointError(f"quantize={name!r} is unknown", f"known: {', '.join(n.lower() for n in known)}")
    return name.upper()


def check_target(fmt: str, shape: tuple[int, ...], what: str) -> None:
    """CheckpointError when a weight of `shape` cannot be quantised to `fmt`."""
    group = group_formats()[target_format(fmt)].group
    if shape[-1] % group:
        fits = [str(g) for g in (128, 64, 32) if shape[-1] % g == 0]
        raise CheckpointError(
            f"'{what}' has rows of {shape[-1]} values, which is not a multiple of {fmt}'s groups of {group}",
            f"groups of {' or '.join(fits)} fit" if fits else "leave it in its own format",
        )


def quantize_rows(values: torch.Tensor, fmt: str, loss: Loss, where: str) -> npt.NDArray[np.uint8]:
    """Rows of an INT4_G* or INT8_G* format from float32 [rows, cols]; the error is added to `loss`.

    Each group's range, zero included, is cut into 16 or 256 levels. For 4 bits several fractions of the range are tried
    and the one with the least squared error is kept. Errors are those of the stored, rounded scale.

    Raises:
        CheckpointError: a value is not finite; `where` names the weight.
    """
    layout = group_formats()[fmt]
    step = max(1, CHUNK_VALUES // values.shape[1])
    return np.concatenate([_chunk(values[i : i + step], layout, loss, where) for i in range(0, len(values), step)])


def _chunk(values: torch.Tensor, fmt: GroupFormat, loss: Loss, where: str) -> npt.NDArray[np.uint8]:
    if not bool(torch.isfinite(values).all()):
        raise CheckpointError(f"{where} holds values that are not finite, so it cannot be quantised")
    rows = values.shape[0]
    x = values.reshape(-1, fmt.group)
    levels = 2**fmt.bits - 1
    low, high = x.amin(-1, keepdim=True).clamp_(max=0.0), x.amax(-1, keepdim=True).clamp_(min=0.0)
    scale = zero = least = torch.empty(0)
    for share in SHRINK[fmt.bits]:
        tried = _storable((high - low) * (share / levels))
        middle = (low * -share / tried).round_().clamp_(0, levels)
        error = _codes(x, tried, middle, levels).sub_(middle).mul_(tried).sub_(x).square_().sum(-1, keepdim=True)
        better = error < least if least.numel() else torch.ones_like(error, dtype=torch.bool)
        scale, zero, least = (
            torch.where(better, new, old) if old.numel() else new
            for new, old in ((tried, scale), (middle, zero), (error, least))
        )
    loss.error += float(least.sum(dtype=torch.float64))
    loss.value += float(x.square().sum(-1).sum(dtype=torch.float64))
    codes: npt.NDArray[np.uint8] = _codes(x, scale, zero, levels).to(torch.uint8).reshape(rows, -1).numpy()
    packed = pack_nibbles(codes) if fmt.bits == 4 else codes
    bits, wide = _bits(scale.reshape(rows, -1))
    zeros = zero.reshape(rows, -1).numpy().astype(np.uint16) | (wide.astype(np.uint16) << np.uint16(15))
    return pack_int(packed, bits, zeros, fmt.group, bfloat16=False)


def _codes(x: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, levels: int) -> torch.Tensor:
    """Nearest codes of groups [n, group], as float32."""
    return (x * scale.reciprocal()).add_(zero).round_().clamp_(0, levels)


def _half(scale: torch.Tensor) -> torch.Tensor:
    """Where float16 holds a scale with all its bits."""
    return (scale >= F16_LEAST) & (scale <= F16_MOST)


def _storable(scale: torch.Tensor) -> torch.Tensor:
    """Rounded to float16, outside its range to bfloat16; of a group of zeros 1."""
    rounded = torch.where(_half(scale), scale.half().float(), scale.bfloat16().float())
    return torch.where(rounded > 0, rounded.clamp(min=LEAST_SCALE), torch.ones_like(rounded))


def _bits(scale: torch.Tensor) -> tuple[npt.NDArray[np.uint16], npt.NDArray[np.bool_]]:
    """The 16 bits of scales that `_storable` gave, and which of them are bfloat16."""
    half: npt.NDArray[np.bool_] = _half(scale).numpy()
    narrow = scale.half().view(torch.int16).numpy().view(np.uint16)
    wide = scale.bfloat16().view(torch.int16).numpy().view(np.uint16)
    return np.where(half, narrow, wide), ~half
