"""AWQ weights in the GEMM layout: codes packed along the output in an interleaved order, zero points likewise.

`qweight` int32 [in, out / 8], `qzeros` int32 [groups, out / 8], `scales` [groups, out]. Nibble t of word c is output
8 c + (0, 2, 4, 6, 1, 3, 5, 7)[t] (AutoAWQ, utils/packing_utils.py). value = scale * (code - zero).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from ktcore.errors import CheckpointError
from ktcore.weights.checkpoint import Checkpoint
from ktcore.weights.converted import Bytes, LogicalWeight, Stored, logical_info
from ktcore.weights.groups import pack_int, pack_nibbles, unpack_nibbles
from ktcore.weights.methods.integers import group_format, group_scales, half_scales, repeated

ORDER = (0, 4, 1, 5, 2, 6, 3, 7)
"""Output 8 c + n is nibble ORDER[n] of word c."""
SYMMETRIC_ZERO = 8


def awq_weights(checkpoint: Checkpoint, config: Mapping[str, Any]) -> Iterable[LogicalWeight]:
    """Every weight that has a `qweight`.

    Raises:
        CheckpointError: bits or layout are not supported, or a weight's tensors contradict each other.
    """
    bits = config.get("bits", config.get("w_bit"))
    if bits != 4:
        raise CheckpointError(f"{checkpoint.path}: AWQ with bits={bits!r} is not supported", "supported: 4")
    version = str(config.get("version", config.get("format", "gemm"))).lower()
    if version != "gemm":
        raise CheckpointError(f"{checkpoint.path}: AWQ layout '{version}' is not supported", "supported: gemm")
    group = config.get("group_size", config.get("q_group_size"))
    for name in checkpoint.tensors:
        if name.endswith(".qweight"):
            yield AwqWeight(checkpoint, name.removesuffix(".qweight"), group, bool(config.get("zero_point", True)))


class AwqWeight(LogicalWeight):
    """INT4_G*."""

    def __init__(self, checkpoint: Checkpoint, module: str, group: Any, zero_point: bool) -> None:
        name = f"{module}.weight"
        self._codes = Stored(checkpoint, f"{module}.qweight", ("I32",))
        if len(self._codes.shape) != 2:
            raise CheckpointError(f"{self._codes.where} has shape {list(self._codes.shape)}, expected a matrix")
        cols, out = self._codes.shape[0], self._codes.shape[1] * 8
        given = group if isinstance(group, int) else None
        self._scales, groups = group_scales(checkpoint, module, cols, out, given, f"{cols} inputs")
        self._stored_group = cols // groups
        zeros = f"{module}.qzeros"
        absent = not zero_point and zeros not in checkpoint.tensors
        self._zeros = None if absent else Stored(checkpoint, zeros, ("I32",), (groups, out // 8), owner=name)
        fmt, self._group = group_format(self._codes.where, 4, self._stored_group, cols)
        self.info = logical_info(name, (out, cols), fmt)
        self.sources = (self._codes.name, self._scales.name, *([] if absent else [zeros]))

    def rows(self, start: int, stop: int) -> Bytes:
        codes = pack_nibbles(np.ascontiguousarray(_outputs(self._codes, start, stop).T))
        bits, bfloat16 = half_scales(self._scales, self._scales.read()[:, start:stop].T)
        scale = repeated(bits, self._group, self._stored_group)
        zero: npt.NDArray[Any] | int = SYMMETRIC_ZERO
        if self._zeros is not None:
            zero = repeated(_outputs(self._zeros, start, stop).T.astype(np.uint16), self._group, self._stored_group)
        return pack_int(codes, scale, zero, self._group, bfloat16=bfloat16)


def _outputs(words: Stored, start: int, stop: int) -> npt.NDArray[np.uint8]:
    """Unpacked codes [first axis, stop - start] of a range of outputs."""
    first, last = start // 8, -(-stop // 8)
    some = np.ascontiguousarray(np.asarray(words.read(), dtype=np.int32)[:, first:last])
    nibbles = unpack_nibbles(some.view(np.uint8)).reshape(len(some), -1, 8)[..., ORDER]
    return np.ascontiguousarray(nibbles).reshape(len(some), -1)[:, start - 8 * first : stop - 8 * first]
