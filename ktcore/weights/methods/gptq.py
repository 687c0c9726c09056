"""GPTQ weights: codes packed along the input, scales and zero points by group, columns perhaps in activation order.

`qweight` int32 [in * bits / 32, out], `qzeros` int32 [groups, out * bits / 32], `scales` [groups, out], `g_idx` int32
[in]; earlier values in lower bits. Version 1 stores zero points less 1 (AutoGPTQ, `checkpoint_format` "gptq"); that of
16 for 4 bits must not wrap to 0. value = scale * (code - zero).
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
from ktcore.weights.methods.integers import group_format, group_scales, half_scales, module_schemes, repeated
from ktcore.weights.methods.overrides import dynamic_overrides

ZERO_OFFSETS = {"gptq": 1, "gptq_v2": 0}


def gptq_weights(checkpoint: Checkpoint, config: Mapping[str, Any]) -> Iterable[LogicalWeight]:
    """Every weight that has a `qweight`; GPTQModel's `dynamic` may give a module bits and groups of its own.

    Raises:
        CheckpointError: bits or layout version are not supported, or a weight's tensors contradict each other.
    """
    version = config.get("checkpoint_format") or config.get("format") or "gptq"
    if version not in ZERO_OFFSETS:
        raise CheckpointError(
            f"{checkpoint.path}: GPTQ checkpoint_format '{version}' is not supported",
            f"supported: {', '.join(ZERO_OFFSETS)}",
        )
    overrides = dynamic_overrides(f"{checkpoint.path}: quantization_config", config)
    for module, scheme in module_schemes(checkpoint, config, "GPTQ", (4, 8), overrides):
        yield GptqWeight(checkpoint, module, scheme.bits, scheme.group, scheme.desc_act, ZERO_OFFSETS[version])


class GptqWeight(LogicalWeight):
    """INT4_G* or INT8_G*; in activation order the columns are sorted by group, and the format says so."""

    def __init__(
        self, checkpoint: Checkpoint, module: str, bits: int, group: int | None, desc_act: bool, zero_offset: int
    ) -> None:
        name, per_word = f"{module}.weight", 32 // bits
        self._codes = Stored(checkpoint, f"{module}.qweight", ("I32",))
        where = self._codes.where
        if len(self._codes.shape) != 2:
            raise CheckpointError(f"{where} has shape {list(self._codes.shape)}, expected a matrix")
        cols, out = self._codes.shape[0] * per_word, self._codes.shape[1]
        self._scales, groups = group_scales(checkpoint, module, cols, out, group, f"{cols} inputs of {bits} bits")
        self._stored_group = cols // groups
        self._zeros = Stored(checkpoint, f"{module}.qzeros", ("I32",), (groups, -(-out // per_word)), owner=name)
        index = f"{module}.g_idx"
        present = index in checkpoint.tensors
        ordered = desc_act and present and groups > 1
        self._index = Stored(checkpoint, index, ("I32",), (cols,)) if present else None
        fmt, self._group = group_format(where, bits, self._stored_group, cols, ordered)
        self._bits, self._zero_offset, self._ordered = bits, zero_offset, ordered
        self.info = logical_info(name, (out, cols), fmt)
        self.sources = (self._codes.name, self._scales.name, self._zeros.name, *([index] if present else []))

    def rows(self, start: int, stop: int) -> Bytes:
        order = self._order()
        per_word = 32 // self._bits
        words = np.asarray(self._codes.read(), dtype=np.int32)[:, start:stop]
        # little-endian bytes of a word hold consecutive inputs, low bits first: already the format's order
        codes = np.ascontiguousarray(np.ascontiguousarray(words).view(np.uint8).reshape(*words.shape, 4).swapaxes(0, 1))
        codes = codes.reshape(stop - start, -1)
        if order is not None:
            codes = codes[:, order] if self._bits == 8 else pack_nibbles(unpack_nibbles(codes)[:, order])
        packed = np.ascontiguousarray(np.asarray(self._zeros.read(), dtype=np.int32)).view(np.uint8)
        zeros = (packed if self._bits == 8 else unpack_nibbles(packed)).reshape(-1, self._zeros.shape[1] * per_word)
        zero = (zeros[:, start:stop].astype(np.uint16) + np.uint16(self._zero_offset)).T
        bits, bfloat16 = half_scales(self._scales, self._scales.read()[:, start:stop].T)
        scale, zero = (repeated(v, self._group, self._stored_group) for v in (bits, zero))
        return pack_int(codes, scale, zero, self._group, bfloat16=bfloat16)

    def input_order(self) -> npt.NDArray[np.int64]:
        order = self._order()
        return super().input_order() if order is None else order

    def _order(self) -> npt.NDArray[np.int64] | None:
        """Inputs sorted by group; None when the file has them so."""
        if self._index is None:
            return None
        order = sorted_by_group(self._index, self._stored_group)
        if self._ordered:
            return order
        if (np.diff(order) < 0).any():
            raise CheckpointError(
                f"{self._index.where} is not in ascending order, though config.json does not say desc_act",
                "set desc_act to true in its quantization_config",
            )
        return None


def sorted_by_group(index: Stored, size: int) -> npt.NDArray[np.int64]:
    """Inputs sorted by the group that `index` [in] gives each, within a group in order.

    Raises:
        CheckpointError: a group does not have exactly `size` inputs.
    """
    found = np.asarray(index.read(), dtype=np.int64)
    groups = len(found) // size
    counts = np.bincount(found, minlength=groups) if (found >= 0).all() else np.zeros(0, dtype=np.int64)
    if len(counts) != groups or (counts != size).any():
        raise CheckpointError(
            f"{index.where}: expected each of {groups} groups {size} times, found "
            f"{counts.min(initial=size)} to {counts.max(initial=0)} times"
        )
    return np.argsort(found, kind="stable")
