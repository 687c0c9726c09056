"""Where a weight lives in a checkpoint (`WeightRef`, header knowledge only) and the opened thing (`Weight`)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch

from ktcore.errors import CheckpointError
from ktcore.weights.formats import dequantize, get_format, row_bytes
from ktcore.weights.quantize import Loss, check_target, quantize_rows

if TYPE_CHECKING:
    from ktcore.weights.checkpoint import Checkpoint


@dataclass(frozen=True)
class WeightRef:
    """A weight by name, made from one or several tensors of a checkpoint without reading them.

    Attributes:
        sources: tensor names; several are stacked along a new first axis (one tensor an expert).
        shape: torch order [..., out, in] after all below; may reshape a single source.
        format: weight format of the bytes that `Weight.raw` gives.
        rows: slice (start, stop, step) of the second to last axis, or of a vector's only one, for the parts of a fused
            tensor; None takes all.
        columns: such a slice of the last axis, for stacks of biases.
        input_major: the file holds the transpose of the last two axes.
        stored: the format in the checkpoint, where the weight is quantised while it is loaded; else None.
    """

    sources: tuple[str, ...]
    shape: tuple[int, ...]
    format: str
    rows: tuple[int, int, int] | None = None
    columns: tuple[int, int, int] | None = None
    input_major: bool = False
    stored: str | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of this weight in its format."""
        return math.prod(self.shape[:-1]) * row_bytes(self.format, self.shape[-1])

    @classmethod
    def of(cls, checkpoint: Checkpoint, *names: str, shape: tuple[int, ...] | None = None) -> WeightRef:
        """The tensor `names[0]`, or the stack of all of them.

        Raises:
            CheckpointError: a tensor is absent, or stacked ones differ in shape or format.
        """
        infos = []
        for name in names:
            if name not in checkpoint.tensors:
                raise CheckpointError(
                    f"{checkpoint.path}: tensor '{name}' is missing",
                    "the file is incomplete, or its architecture is not the one its metadata names",
                )
            infos.append(checkpoint.tensors[name])
        first = infos[0]
        for info in infos[1:]:
            if (info.shape, info.format) != (first.shape, first.format):
                raise CheckpointError(
                    f"{checkpoint.path}: '{info.name}' is {info.format}{list(info.shape)}, but '{first.name}', "
                    f"which belongs to the same stack, is {first.format}{list(first.shape)}"
                )
        stacked = first.shape if len(infos) == 1 else (len(infos), *first.shape)
        return cls(tuple(names), shape or stacked, first.format)

    def slice_rows(self, start: int, stop: int, step: int = 1) -> WeightRef:
        """Rows start, start + step … below stop of the second to last axis; of a vector, its items."""
        count = len(range(start, stop, step))
        shape = (count,) if len(self.shape) == 1 else (*self.shape[:-2], count, self.shape[-1])
        return replace(self, shape=shape, rows=(start, stop, step))

    def slice_columns(self, start: int, stop: int, step: int = 1) -> WeightRef:
        """Items start, start + step … below stop of the last axis.

        Raises:
            CheckpointError: values share scales in blocks along it.
        """
        if get_format(self.format).is_quantized:
            raise CheckpointError(f"'{self.sources[0]}': columns of a {self.format} weight cannot be taken apart")
        columns = (start, stop, step)
        return replace(self, shape=(*self.shape[:-1], len(range(*columns))), columns=columns)

    def transposed(self) -> WeightRef:
        """For weights stored input-major, [..., in, out]: the same as [..., out, in]. Slice rows after this.

        Raises:
            CheckpointError: values share scales in blocks along the stored rows, so they cannot change places.
        """
        if get_format(self.format).is_quantized:
            raise CheckpointError(f"'{self.sources[0]}': a {self.format} weight cannot be transposed")
        return replace(self, shape=(*self.shape[:-2], self.shape[-1], self.shape[-2]), input_major=True)

    def quantized(self, format: str) -> WeightRef:
        """The same weight, quantised to `format` (INT4_G* or INT8_G*) while it is loaded.

        Raises:
            CheckpointError: the format is none of these, or the rows are no whole number of its groups.
        """
        check_target(format, self.shape, self.sources[0])
        return replace(self, format=format, stored=self.stored or self.format)

    def open(self, checkpoint: Checkpoint) -> Weight:
        """The weight's bytes; nothing is read from disk before they are touched."""
        return Weight(checkpoint, self)


class Weight:
    """An opened weight: raw bytes in its format, or float32 values."""

    def __init__(
        self, checkpoint: Checkpoint, ref: WeightRef, item: int | None = None, loss: Loss | None = None
    ) -> None:
        self._checkpoint = checkpoint
        self._whole = ref
        self._item = item
        self.ref = ref if item is None else replace(ref, shape=ref.shape[1:])
        self.loss = loss or Loss()
        """What quantising while loading has cost so far, this weight's parts included."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Torch order [..., out, in]."""
        return self.ref.shape

    @property
    def format(self) -> str:
        """Name of the weight format of `raw()`."""
        return self.ref.format

    @property
    def input_order(self) -> np.ndarray | None:
        """int64 [in], of a stack [items, in]: column j of `raw()` belongs to input input_order[j]. None: j itself.

        Only formats whose name ends in "_ORDERED" (GPTQ's act-order) have one; who takes `raw()` of these gathers its
        input by it. `tensor()` needs no care, its columns are in place.
        """
        if not get_format(self.format).ordered:
            return None
        orders = [self._checkpoint.input_order(name) for name in self._names()]
        return orders[0] if len(orders) == 1 else np.stack(orders)

    def raw(self) -> np.ndarray:
        """Bytes, uint8 [rows, row_bytes] with all leading axes folded; a view of the file where it can be."""
        if self.ref.stored is not None:
            return self._quantised()
        width = row_bytes(self.format, self.shape[-1])
        parts = [self._rows(name).reshape(-1, width) for name in self._names()]
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def tensor(self) -> torch.Tensor:
        """Dequantised values, float32 in `shape`."""
        values = dequantize(self.format, self.raw(), self.shape)
        order = self.input_order
        if order is None:
            return values
        index = torch.from_numpy(order)[..., None, :].expand(self.shape)
        return torch.empty_like(values).scatter_(-1, index, values)

    def part(self, index: int) -> Weight:
        """Item `index` of the first axis (one expert), opened on its own."""
        if len(self.ref.sources) > 1:
            ref = replace(self.ref, sources=(self.ref.sources[index],), shape=self.shape[1:])
            return Weight(self._checkpoint, ref, loss=self.loss)
        return Weight(self._checkpoint, self.ref, index, self.loss)

    def subset(self, indices: Sequence[int]) -> Weight:
        """Items `indices` of the first axis, as a weight of its own."""
        return _Subset(self._checkpoint, self, tuple(indices))

    def release(self) -> None:
        """Let the operating system drop this weight's file pages from memory; reading again brings them back.

        Of one item of a stored stack nothing: the pages belong to the whole tensor, which releases them.
        """
        if self._item is None:
            for name in self.ref.sources:
                self._checkpoint.release(name)

    def _names(self) -> tuple[str, ...]:
        return self.ref.sources

    def _rows(self, name: str) -> np.ndarray:
        """The wanted bytes of one source."""
        stored = self._checkpoint.tensors[name].shape
        if self._whole.input_major:
            return self._transposed(name, stored)
        if len(stored) == 1 and self._whole.rows is not None:
            return self._columns(self._checkpoint.raw(name), stored, self._whole.rows)
        found = self._whole_rows(name, stored)
        return found if self._whole.columns is None else self._columns(found, stored, self._whole.columns)

    def _whole_rows(self, name: str, stored: tuple[int, ...]) -> np.ndarray:
        if self._whole.rows is None:
            if self._item is None:
                return self._checkpoint.raw(name)
            height = math.prod(self.shape[:-1])
            return self._checkpoint.rows(name, self._item * height, (self._item + 1) * height)
        start, stop, step = self._whole.rows
        height = stored[-2]
        items = range(math.prod(stored[:-2])) if self._item is None else [self._item]
        found = [self._checkpoint.rows(name, i * height + start, i * height + stop)[::step] for i in items]
        return found[0] if len(found) == 1 else np.concatenate(found)

    def _columns(self, raw: np.ndarray, stored: tuple[int, ...], columns: tuple[int, int, int]) -> np.ndarray:
        size = get_format(self.format).block_bytes
        taken: np.ndarray = raw.reshape(-1, stored[-1], size)[:, slice(*columns)]
        return taken

    def _transposed(self, name: str, stored: tuple[int, ...]) -> np.ndarray:
        height = stored[-2]
        size = get_format(self._checkpoint.tensors[name].format).block_bytes
        start, stop, step = self._whole.rows or (0, stored[-1], 1)
        items = range(math.prod(stored[:-2])) if self._item is None else [self._item]
        out = []
        for i in items:
            values = self._checkpoint.rows(name, i * height, (i + 1) * height).reshape(height, stored[-1], size)
            out.append(np.ascontiguousarray(values[:, start:stop:step].swapaxes(0, 1)).reshape(-1, height * size))
        return out[0] if len(out) == 1 else np.concatenate(out)

    def _quantised(self) -> np.ndarray:
        if self._item is None and len(self.shape) > 2:
            return np.concatenate([self.part(i).raw() for i in range(self.shape[0])])
        assert self.ref.stored is not None
        source = replace(self._whole, format=self.ref.stored, stored=None)
        values = Weight(self._checkpoint, source, self._item).tensor()
        where = f"{self._checkpoint.path}: '{self.ref.sources[0]}'"
        return quantize_rows(values.reshape(-1, self.shape[-1]), self.format, self.loss, where)


class _Subset(Weight):
    """Some items of another weight's first axis."""

    def __init__(self, checkpoint: Checkpoint, whole: Weight, indices: tuple[int, ...]) -> None:
        ref = replace(whole.ref, shape=(len(indices), *whole.shape[1:]))
        super().__init__(checkpoint, ref, loss=whole.loss)
        self._of = whole
        self._indices = indices

    @property
    def input_order(self) -> np.ndarray | None:
        orders = [self._of.part(i).input_order for i in self._indices]
        known = [order for order in orders if order is not None]
        return np.stack(known) if known else None

    def raw(self) -> np.ndarray:
        return np.concatenate([self._of.part(i).raw() for i in self._indices])

    def part(self, index: int) -> Weight:
        return self._of.part(self._indices[index])

    def subset(self, indices: Sequence[int]) -> Weight:
        return self._of.subset([self._indices[i] for i in indices])

    def release(self) -> None:
        self._of.release()
