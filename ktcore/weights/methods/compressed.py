"""compressed-tensors weights: integers, packed or plain, FP8, MXFP4, NVFP4, as config groups and the tensors say.

Packed: `weight_packed` int32 [out, words], earlier values in lower bits, offset by 2^(bits - 1); `weight_scale`
[out, groups]; `weight_zero_point` packed along the first axis with the same offset. The offsets cancel:
value = scale * (stored code - stored zero). Bits that do not divide 32 are packed in two ways (`Packing`).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from ktcore.errors import CheckpointError
from ktcore.weights.checkpoint import Checkpoint
from ktcore.weights.converted import Bytes, LogicalWeight, Stored, logical_info
from ktcore.weights.groups import NVFP4_SCALED, pack_int, pack_nibbles
from ktcore.weights.methods.fp8 import Fp8Weight, block_size
from ktcore.weights.methods.gptq import sorted_by_group
from ktcore.weights.methods.integers import SCALE_FORMATS, group_format, half_scales, repeated
from ktcore.weights.methods.mxfp4 import PackedMxfp4Weight
from ktcore.weights.methods.nvfp4 import Nvfp4Weight
from ktcore.weights.methods.schemes import Scheme, Schemes
from ktcore.weights.methods.words import Packing, unpack


def compressed_weights(checkpoint: Checkpoint, config: Mapping[str, Any]) -> Iterable[LogicalWeight]:
    """Every weight with a `weight_packed`, or with integers or FP8 codes in `weight`.

    Raises:
        CheckpointError: a format that is not supported, or tensors that contradict each other or the configuration.
    """
    return _weights(checkpoint, Schemes(checkpoint, config))


def _weights(checkpoint: Checkpoint, schemes: Schemes) -> Iterator[LogicalWeight]:
    for name, info in checkpoint.tensors.items():
        if name.endswith(".weight_packed"):
            module = name.removesuffix(".weight_packed")
            scheme = schemes.of(module)
            if scheme.kind == "float" and scheme.group_size == NVFP4_SCALED:
                yield Nvfp4Weight(checkpoint, f"{module}.weight", name, f"{module}.weight_global_scale", divides=True)
            elif scheme.kind == "float":
                yield PackedMxfp4Weight(checkpoint, f"{module}.weight", name, f"{module}.weight_scale")
            else:
                yield IntWeight(checkpoint, module, "weight_packed", scheme)
        elif name.endswith(".weight") and info.format == "I8":
            module = name.removesuffix(".weight")
            yield IntWeight(checkpoint, module, "weight", schemes.of(module))
        elif name.endswith(".weight") and info.format.startswith("F8_"):
            yield Fp8Weight(checkpoint, name, block_size(checkpoint, schemes.of(name.removesuffix(".weight")).block))


class IntWeight(LogicalWeight):
    """INT4_G* or INT8_G* from codes packed in words, or from plain int8; odd widths take the next of the two."""

    def __init__(self, checkpoint: Checkpoint, module: str, role: str, scheme: Scheme) -> None:
        name = f"{module}.weight"
        packed = role == "weight_packed"
        self._codes = Stored(checkpoint, f"{module}.{role}", ("I32",) if packed else ("I8",))
        stored = self._codes.shape
        if len(stored) < 2 or scheme.kind != "int" or (not packed and scheme.bits != 8):
            raise CheckpointError(
                f"{self._codes.where} has shape {list(stored)} and type {self._codes.format}, which does not fit the "
                f"configured {scheme.bits}-bit {scheme.kind} weights"
            )
        self._true_shape = _true_shape(checkpoint, module)
        self._packing = packing = _packing(self._codes, scheme, self._true_shape) if packed else None
        cols = packing.count(stored[-1]) if packing else stored[-1]
        if packing and 32 % scheme.bits and self._true_shape is not None:
            cols = int(self._true_shape.read().reshape(-1)[-1])
        shape = (*stored[:-1], cols)
        self._scale = Stored(checkpoint, f"{module}.weight_scale", SCALE_FORMATS, owner=name)
        self._groups = self._scale.shape[-1] if self._scale.shape else 1
        spread = self._scale.shape == (*stored[:-1], self._groups)
        if not (spread or math.prod(self._scale.shape) == 1) or cols % self._groups:
            raise CheckpointError(
                f"{self._scale.where} has shape {list(self._scale.shape)}; for a weight of {list(shape)} expected "
                f"{[*stored[:-1], 'groups']}"
            )
        group = cols // self._groups
        if scheme.strategy == "group" and scheme.group_size not in (None, -1, group):
            raise CheckpointError(
                f"{self._scale.where} has {self._groups} groups for {cols} inputs, but config.json says "
                f"group_size={scheme.group_size}"
            )
        self._zero = None if scheme.symmetric else self._zeros(checkpoint, module)
        extra = [f"{module}.{part}" for part in ("weight_g_idx", "weight_shape", "input_scale", "input_zero_point")]
        extra = [part for part in extra if part in checkpoint.tensors]
        index = f"{module}.weight_g_idx"
        self._index = Stored(checkpoint, index, ("I32", "I64"), (cols,)) if index in extra and cols > group else None
        # the package goes by the tensor alone; so do we where the configuration says nothing and it is in disorder
        ordered = self._index is not None and (scheme.ordered or _disordered(self._index))
        if not ordered:
            self._index = None
        fmt, self._group = group_format(self._codes.where, 4 if scheme.bits <= 4 else 8, group, cols, ordered)
        self._stored_group, self._bits = group, scheme.bits
        self.info = logical_info(name, shape, fmt)
        zero = [self._zero.name] if self._zero is not None else []
        self.sources = (self._codes.name, self._scale.name, *zero, *extra)

    def rows(self, start: int, stop: int) -> Bytes:
        self._check_shape()
        codes = self._ordered_codes(np.ascontiguousarray(self._codes.read(start, stop)))
        bits, bfloat16 = half_scales(self._scale, self._by_row(self._scale, start, stop))
        zero = repeated(self._zero_points(start, stop), self._group, self._stored_group)
        scale = repeated(bits, self._group, self._stored_group)
        return pack_int(codes, scale, zero, self._group, bfloat16=bfloat16)

    def _ordered_codes(self, stored: npt.NDArray[Any]) -> Bytes:
        """Codes as the format has them, from some stored rows."""
        order, bits = self._order(), self._bits
        if self._packing is None:
            codes = stored.view(np.uint8) ^ np.uint8(128)  # two's complement to offset 128
        elif bits in (4, 8) and (order is None or bits == 8):
            codes = stored.view(np.uint8)  # little-endian words hold them in order
        else:
            codes = unpack(stored.view(np.uint32), self._packing)[:, : self.info.shape[-1]]
        if order is not None:
            codes = codes[:, order]
        narrow = bits < 4 or (bits == 4 and order is not None)
        return pack_nibbles(codes) if narrow else np.ascontiguousarray(codes)

    def input_order(self) -> npt.NDArray[np.int64]:
        order = self._order()
        return super().input_order() if order is None else order

    def _order(self) -> npt.NDArray[np.int64] | None:
        if self._index is None:
            return None
        if (self._index.read() < 0).any():  # never filled in: the package takes the columns as they are
            return np.arange(self.info.shape[-1])
        return sorted_by_group(self._index, self._stored_group)

    def _zeros(self, checkpoint: Checkpoint, module: str) -> Stored:
        stored = self._codes.shape
        shape: tuple[int, ...] = self._scale.shape
        if self._packing:
            shape = (*stored[:-2], self._packing.words(stored[-2]), self._groups)
        allowed = ("I32",) if self._packing else ("I8",)
        return Stored(checkpoint, f"{module}.weight_zero_point", allowed, shape, owner=f"{module}.weight")

    def _zero_points(self, start: int, stop: int) -> npt.NDArray[Any]:
        """uint16 [rows, groups] on the scale of the codes."""
        middle = 2 ** (self._bits - 1)
        if self._zero is None:
            return np.full((stop - start, self._groups), middle, dtype=np.uint16)
        if self._packing is None:
            signed = self._by_row(self._zero, start, stop).astype(np.int16)
            return np.asarray(signed + middle, dtype=np.uint16)
        tall = self._codes.shape[-2]
        words = np.ascontiguousarray(np.asarray(self._zero.read(), dtype=np.int32)).view(np.uint32)
        words = words.reshape(-1, self._zero.shape[-2], self._groups)
        item, row = np.divmod(np.arange(start, stop), tall)
        first, last = int(item[0]), int(item[-1]) + 1
        whole = unpack(words[first:last].swapaxes(1, 2), self._packing)  # [items, groups, rows]
        return np.asarray(whole[item - first, :, row], dtype=np.uint16)

    def _by_row(self, tensor: Stored, start: int, stop: int) -> npt.NDArray[Any]:
        if math.prod(tensor.shape) == 1:
            return np.repeat(tensor.read().reshape(1, 1), stop - start, axis=0)
        return tensor.read(start, stop)

    def _check_shape(self) -> None:
        if self._true_shape is None:
            return
        found = [int(n) for n in np.asarray(self._true_shape.read(), dtype=np.int64).reshape(-1)]
        if found[-2:] != list(self.info.shape[-2:]):
            raise CheckpointError(
                f"{self._true_shape.where} says {found}, but '{self._codes.name}' holds {list(self.info.shape)}"
            )


def _true_shape(checkpoint: Checkpoint, module: str) -> Stored | None:
    name = f"{module}.weight_shape"
    return Stored(checkpoint, name, ("I64", "I32")) if name in checkpoint.tensors else None


def _packing(codes: Stored, scheme: Scheme, true_shape: Stored | None) -> Packing:
    """How the codes lie in their words: where the bits do not divide 32, only the number of words a row tells.

    Raises:
        CheckpointError: it fits neither way, or nothing says how many columns there are.
    """
    sparse = Packing(scheme.bits, dense=False)
    if 32 % scheme.bits == 0:
        return sparse
    if true_shape is None or math.prod(true_shape.shape) < 2:
        name = codes.name.removesuffix("_packed")
        raise CheckpointError(f"{codes.where}: codes of {scheme.bits} bits need '{name}_shape', which is missing")
    cols, words = int(np.asarray(true_shape.read()).reshape(-1)[-1]), codes.shape[-1]
    ways = [p for p in (Packing(scheme.bits, dense=True), sparse) if cols > 0 and p.words(cols) == words]
    if len(ways) != 1:
        told = "neither" if not ways else "either"
        raise CheckpointError(
            f"{codes.where} has rows of {words} words; {cols} columns of {scheme.bits} bits could be {told} of the two "
            f"ways of packing: {Packing(scheme.bits, dense=True).words(cols)} words, or {sparse.words(cols)}"
        )
    return ways[0]


def _disordered(index: Stored) -> bool:
    found = np.asarray(index.read())
    return bool((found >= 0).all() and (np.diff(found) < 0).any())
