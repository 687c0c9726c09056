"""NVFP4 of safetensors: e2m1 codes, an e4m3 scale for 16 of them, and a float32 factor for the tensor.

compressed-tensors (`nvfp4-pack-quantized`): `weight_packed`, `weight_scale`, and `weight_global_scale`, which divides
(compressors/nvfp4). ModelOpt: `weight`, `weight_scale`, and `weight_scale_2`, which multiplies. Codes lie two a
byte, the earlier in the low bits. Factors of inputs are of quantised activations, which exact ones do not need.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from ktcore.errors import CheckpointError
from ktcore.weights.checkpoint import Checkpoint
from ktcore.weights.converted import Bytes, LogicalWeight, Stored, logical_info
from ktcore.weights.groups import NVFP4_GROUP, NVFP4_SCALED, pack_nvfp4, unpack_nibbles
from ktcore.weights.methods.fp8 import MX_BLOCK, Fp8Weight

LARGEST_SCALE = 0x7E
"""Of e4m3, by its bits: 448. Above it is NaN, and then what is negative."""
INPUT_FACTORS = ("input_global_scale", "input_scale")
FACTOR = "weight_scale_2"


def modelopt_weights(checkpoint: Checkpoint, config: Mapping[str, Any]) -> Iterable[LogicalWeight]:
    """Every matrix of bytes with a `weight_scale` (NVFP4), every FP8 one with its scale, MXFP8's exponents included.

    Raises:
        CheckpointError: a tensor is missing or has a shape that does not fit.
    """
    for name, info in checkpoint.tensors.items():
        if not name.endswith(".weight"):
            continue
        if info.format == "U8":
            yield Nvfp4Weight(checkpoint, name, name, name.removesuffix("weight") + FACTOR, divides=False)
        elif info.format.startswith("F8_"):
            scale = checkpoint.tensors.get(name + "_scale")
            yield Fp8Weight(checkpoint, name, MX_BLOCK if scale is not None and scale.format == "U8" else None)


class Nvfp4Weight(LogicalWeight):
    """NVFP4_G128.

    Args:
        codes, factor: names of tensors.
        divides: the factor does, instead of multiplying.
    """

    def __init__(self, checkpoint: Checkpoint, name: str, codes: str, factor: str, *, divides: bool) -> None:
        module = name.removesuffix("weight")
        self._codes = Stored(checkpoint, codes, ("U8",))
        shape = self._codes.shape
        cols = shape[-1] * 2 if len(shape) > 1 else 0
        if not cols or cols % NVFP4_GROUP:
            raise CheckpointError(
                f"{self._codes.where} has shape {list(shape)}; NVFP4 needs rows of a multiple of {NVFP4_GROUP} values, "
                "two a byte"
            )
        scales = (*shape[:-1], cols // NVFP4_SCALED)
        self._scales = Stored(checkpoint, f"{module}weight_scale", ("F8_E4M3",), scales, owner=name)
        self._factor = Stored(checkpoint, factor, ("F32",), owner=name)
        if math.prod(self._factor.shape) not in (1, math.prod(shape[:-2])):
            raise CheckpointError(
                f"{self._factor.where} has shape {list(self._factor.shape)}, expected one value a matrix"
            )
        self._divides = divides
        self.info = logical_info(name, (*shape[:-1], cols), f"NVFP4_G{NVFP4_GROUP}")
        unused = (module + suffix for suffix in INPUT_FACTORS)
        used = (codes, self._scales.name, factor)
        self.sources = (*used, *(u for u in unused if u in checkpoint.tensors))

    def rows(self, start: int, stop: int) -> Bytes:
        scales = np.asarray(self._scales.read(start, stop), dtype=np.uint8)
        if (scales > LARGEST_SCALE).any():
            raise CheckpointError(f"{self._scales.where} has scales that are negative or not a number")
        factors = self._factor.floats().reshape(-1)
        with np.errstate(divide="ignore"):
            factors = np.float32(1) / factors if self._divides else factors
        if not np.isfinite(factors).all():
            raise CheckpointError(f"{self._factor.where} is zero or not finite, so it is no factor")
        item = np.minimum(np.arange(start, stop) // self._codes.shape[-2], len(factors) - 1)
        codes = unpack_nibbles(np.asarray(self._codes.read(start, stop), dtype=np.uint8))
        return pack_nvfp4(codes, scales, np.asarray(factors[item], dtype=np.float32))
