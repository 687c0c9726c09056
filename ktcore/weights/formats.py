"""Weight formats by name: how many bytes a row takes, and what its values are in fp32.

Names are open strings, spelled as in GGUF and safetensors; a plugin adds its own with :func:`register_format`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from ktcore.errors import CheckpointError
from ktcore.weights.groups import ORDERED, dequantize_groups, group_formats
from ktcore.weights.low_bits import DEQUANTIZERS

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class WeightFormat:
    """How the values of one row are stored.

    Args:
        name: open string, as in GGUF (``Q4_K``) or safetensors (``F8_E4M3``).
        block_size: values in a block; a row must hold a whole number of blocks.
        block_bytes: bytes of a block, scales included.
        ggml_type: the number that GGUF headers use for it, if they do.
    """

    name: str
    block_size: int
    block_bytes: int
    ggml_type: int | None = None

    @property
    def is_quantized(self) -> bool:
        """True when values share scales in blocks."""
        return self.block_size > 1

    @property
    def ordered(self) -> bool:
        """True when columns are stored in another order than the input's (`Weight.input_order`)."""
        return self.name.endswith(ORDERED)


def get_format(name: str) -> WeightFormat:
    """The format of that name.

    Raises:
        CheckpointError: no format has that name; the message lists the known ones.
    """
    try:
        return _FORMATS[name]
    except KeyError:
        raise CheckpointError(f"unknown weight format {name!r}", f"known formats: {', '.join(_FORMATS)}") from None


def get_ggml_format(number: int) -> WeightFormat | None:
    """The format that GGUF headers call by this number, or None."""
    return next((fmt for fmt in _FORMATS.values() if fmt.ggml_type == number), None)


def known_formats() -> tuple[str, ...]:
    """Names of all known formats, in the order they were added."""
    return tuple(_FORMATS)


def is_readable(name: str) -> bool:
    """Whether a format's values can be had: all but some that are known by their size only.

    A format that a plugin registered is the plugin's affair, and counts as readable.
    """
    return name not in _SIZE_ONLY


def register_format(fmt: WeightFormat) -> None:
    """Make a format known by its name; adding the same one again does nothing.

    Raises:
        CheckpointError: the name, or its GGUF number, already means something else.
    """
    if fmt.block_size < 1 or fmt.block_bytes < 1:
        raise CheckpointError(f"weight format {fmt.name!r} needs a positive block size and block bytes")
    if _FORMATS.setdefault(fmt.name, fmt) != fmt:
        raise CheckpointError(f"weight format {fmt.name!r} is already known as {_FORMATS[fmt.name]}")
    same_number = [f for f in _FORMATS.values() if f.ggml_type == fmt.ggml_type and f.ggml_type is not None]
    if len(same_number) > 1:
        del _FORMATS[fmt.name]
        raise CheckpointError(
            f"weight format {fmt.name!r}: GGUF type {fmt.ggml_type} already means {same_number[0].name}"
        )


def row_bytes(fmt: WeightFormat | str, cols: int) -> int:
    """Bytes of one row of `cols` values.

    Raises:
        CheckpointError: `cols` is not a whole number of blocks.
    """
    fmt = get_format(fmt) if isinstance(fmt, str) else fmt
    blocks, rest = divmod(cols, fmt.block_size)
    if rest:
        raise CheckpointError(f"a row of {cols} values is not a multiple of {fmt.name}'s block of {fmt.block_size}")
    return blocks * fmt.block_bytes


def dequantize(fmt: WeightFormat | str, raw: npt.NDArray[np.uint8], shape: Sequence[int]) -> torch.Tensor:
    """The values of a stored tensor as a new, contiguous fp32 tensor of `shape` (torch order, rows last).

    GGUF's block formats go through the gguf package, which is the reference for them; plain types through torch.
    Columns of an ordered format stay as they are stored (`Weight.tensor` puts them in place).

    Args:
        raw: the tensor's bytes, flat uint8; read only, never kept.

    Raises:
        CheckpointError: `raw` does not have the bytes that `shape` needs, or nothing can dequantise the format.
    """
    import torch

    fmt = get_format(fmt) if isinstance(fmt, str) else fmt
    cols = shape[-1] if len(shape) else 1
    rows = math.prod(shape[:-1]) if len(shape) else 1
    wanted = rows * row_bytes(fmt, cols)
    if raw.size != wanted or raw.dtype != np.uint8:
        raise CheckpointError(
            f"{fmt.name} tensor of shape {list(shape)} takes {wanted} bytes, got {raw.size} {raw.dtype}"
        )

    if wanted == 0:
        return torch.empty(tuple(shape), dtype=torch.float32)
    dtype = getattr(torch, _TORCH_DTYPES.get(fmt.name, ""), None)
    if dtype is not None:
        # A copy: the source may be a read-only map, unaligned for its type, and outlived by the result.
        return torch.from_numpy(raw.reshape(-1).copy()).view(dtype).to(torch.float32).reshape(tuple(shape))

    if fmt.name in (groups := group_formats()):
        return torch.from_numpy(dequantize_groups(groups[fmt.name], raw, rows)).reshape(tuple(shape))

    if fmt.name in DEQUANTIZERS:
        return torch.from_numpy(DEQUANTIZERS[fmt.name](raw).reshape(tuple(shape)))

    import gguf

    try:
        kind = gguf.GGMLQuantizationType[fmt.name]
        values: npt.NDArray[Any] = gguf.quants.dequantize(raw.reshape(rows, -1), kind)
    except (KeyError, NotImplementedError):
        raise CheckpointError(f"no dequantisation is known for weight format {fmt.name}") from None
    return torch.from_numpy(np.ascontiguousarray(values, dtype=np.float32)).reshape(tuple(shape))


# name, values in a block, bytes of a block, GGUF number
_GGML_FORMATS = (
    ("F32", 1, 4, 0),
    ("F16", 1, 2, 1),
    ("BF16", 1, 2, 30),
    ("Q4_0", 32, 18, 2),
    ("Q4_1", 32, 20, 3),
    ("Q5_0", 32, 22, 6),
    ("Q5_1", 32, 24, 7),
    ("Q8_0", 32, 34, 8),
    ("Q8_1", 32, 40, 9),
    ("Q2_K", 256, 84, 10),
    ("Q3_K", 256, 110, 11),
    ("Q4_K", 256, 144, 12),
    ("Q5_K", 256, 176, 13),
    ("Q6_K", 256, 210, 14),
    ("Q8_K", 256, 292, 15),
    ("IQ2_XXS", 256, 66, 16),
    ("IQ2_XS", 256, 74, 17),
    ("IQ3_XXS", 256, 98, 18),
    ("IQ1_S", 256, 50, 19),
    ("IQ4_NL", 32, 18, 20),
    ("IQ3_S", 256, 110, 21),
    ("IQ2_S", 256, 82, 22),
    ("IQ4_XS", 256, 136, 23),
    ("I8", 1, 1, 24),
    ("I16", 1, 2, 25),
    ("I32", 1, 4, 26),
    ("I64", 1, 8, 27),
    ("F64", 1, 8, 28),
    ("IQ1_M", 256, 56, 29),
    ("TQ1_0", 256, 54, 34),
    ("TQ2_0", 256, 66, 35),
    ("MXFP4", 32, 17, 39),
    ("NVFP4", 64, 36, 40),
    ("Q1_0", 128, 18, 41),
    ("Q2_0", 64, 18, 42),
)

# Types that only safetensors has, under its names.
_SAFETENSORS_FORMATS = (
    ("BOOL", 1, 1),
    ("U8", 1, 1),
    ("U16", 1, 2),
    ("U32", 1, 4),
    ("U64", 1, 8),
    ("F8_E4M3", 1, 1),
    ("F8_E5M2", 1, 1),
    ("F8_E8M0", 1, 1),
    ("F8_E4M3FNUZ", 1, 1),
    ("F8_E5M2FNUZ", 1, 1),
    ("F6_E2M3", 4, 3),
    ("F6_E3M2", 4, 3),
    ("F4", 2, 1),
    ("C64", 1, 8),
)

_FORMATS: dict[str, WeightFormat] = {
    **{row[0]: WeightFormat(*row) for row in (*_GGML_FORMATS, *_SAFETENSORS_FORMATS)},
    **{f.name: WeightFormat(f.name, f.group, f.block_bytes) for f in group_formats().values()},
}

# Intermediate results of ggml, and types whose bits no checkpoint's weights have been seen in.
_SIZE_ONLY = frozenset(("Q8_1", "Q8_K", "U16", "U32", "U64", "C64", "F4", "F6_E2M3", "F6_E3M2"))

_TORCH_DTYPES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "F8_E8M0": "float8_e8m0fnu",
    "F8_E4M3FNUZ": "float8_e4m3fnuz",
    "F8_E5M2FNUZ": "float8_e5m2fnuz",
    "I8": "int8",
    "I16": "int16",
    "I32": "int32",
    "I64": "int64",
    "U8": "uint8",
    "BOOL": "bool",
}
