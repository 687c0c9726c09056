"""Where a weight lives in a checkpoint (`WeightRef`, header knowledge only) and the opened thing (`Weight`)."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch

from ktcore.errors import CheckpointError
from ktcore.weights.formats import dequantize, get_format, row_bytes
from ktcore.weights.quantize import Loss, check_target, quantize_rows

if TYPE_CHECKING:
    from ktcore.weights.checkpoint import Checkpoint


PIECE_VALUES = 1 << 24
"""Values of a matrix in float32 at once, while it is quantised."""

RowSlice = tuple[int, int, int]
"""Start, stop and step."""


@dataclass(frozen=True)
class WeightRef:
    """A weight by name, made from one or several tensors of a checkpoint without reading them.

    Attributes:
        sources: tensor names; several are stacked along a new first axis (one tensor an expert).
        shape: torch order [..., out, in] after all below; may reshape a single source.
        format: weight format of the bytes that `Weight.raw` gives.
        rows: slices of the second to last axis, one after another, for the parts of a fused tensor; None takes all.
        height: length of that axis before slicing.
        items: the slices are of the last axis instead, of a format that has one value a block (biases).
        transposed: the file holds [..., in, out], in such a format; slices are taken after this.
        stored: the format in the checkpoint, where the weight is quantised while it is loaded; else None.
    """

    sources: tuple[str, ...]
    shape: tuple[int, ...]
    format: str
    rows: tuple[RowSlice, ...] | None = None
    height: int = 0
    items: bool = False
    transposed: bool = False
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

    def pick_rows(self, *slices: RowSlice, items: bool = False) -> WeightRef:
        """Rows of several slices (start, stop, step), one after another; of a vector, or with `items`, values of the
        last axis.

        Raises:
            CheckpointError: `items` of a format whose values share scales in blocks.
        """
        items = items or len(self.shape) == 1
        count = sum(len(range(*s)) for s in slices)
        if items:
            self._check_plain("its last axis cannot be sliced")
            return replace(self, shape=(*self.shape[:-1], count), rows=slices, height=self.shape[-1], items=True)
        return replace(self, shape=(*self.shape[:-2], count, self.shape[-1]), rows=slices, height=self.shape[-2])

    def swap(self) -> WeightRef:
        """The same tensor with its last two axes swapped, for weights stored input by output. Slice after this.

        Raises:
            CheckpointError: its values share scales in blocks.
        """
        self._check_plain("its axes cannot be swapped")
        return replace(self, shape=(*self.shape[:-2], self.shape[-1], self.shape[-2]), transposed=True)

    def _check_plain(self, problem: str) -> None:
        if get_format(self.format).is_quantized:
            raise CheckpointError(f"'{self.sources[0]}' is {self.format}, whose values share scales: {problem}")

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
        orders = [self._checkpoint.input_order(name) for name in self.ref.sources]
        return orders[0] if len(orders) == 1 else np.stack(orders)

    @property
    def identity(self) -> str:
        """Which bytes of the checkpoint it is, and in which format: the same text for the same weight."""
        return f"{self._whole}[{self._item}]"

    def raw(self) -> np.ndarray:
        """Bytes, uint8 [rows, row_bytes], contiguous, leading axes folded; a view of the file where it can be."""
        if self.ref.stored is not None:
            return self._quantised()
        width = row_bytes(self.format, self.shape[-1])
        parts = [self._rows(name).reshape(-1, width) for name in self.ref.sources]
        return np.ascontiguousarray(_joined(parts, axis=0))

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

    def scattered(self) -> None:
        """Told before rows are gathered: they lie far from each other, and none is read for its neighbour."""
        for name in self._plain_sources():
            self._checkpoint.scattered(name)

    def gather(self, rows: npt.NDArray[np.int64]) -> torch.Tensor:
        """Rows int64 [n] of a weight that is stored as it is, leading axes folded, in float32 [n, cols].

        Only pages that they lie in are read, and all of them are asked for before the first. Of a quantisation method's
        weights the rows are converted one by one.
        """
        names, width = self._plain_sources(), row_bytes(self.format, self.shape[-1])
        height = math.prod(self.shape[:-1]) // len(names)
        source, within = np.divmod(rows, height)
        places = {int(i): np.flatnonzero(source == i) for i in np.unique(source)}
        for i, at in places.items():
            self._checkpoint.ask_for_rows(names[i], within[at])
        found = np.empty((len(rows), width), np.uint8)
        for i, at in places.items():
            found[at] = self._checkpoint.take_rows(names[i], within[at])
        return dequantize(self.format, found.reshape(-1), (len(rows), self.shape[-1]))

    def _plain_sources(self) -> tuple[str, ...]:
        ref = self._whole
        if ref.rows is not None or ref.transposed or ref.stored is not None or self._item is not None:
            raise CheckpointError(f"'{ref.sources[0]}': single rows are read of whole tensors, as they are stored")
        return ref.sources

    def release(self) -> None:
        """Let the operating system drop this weight's file pages from memory; reading again brings them back.

        Of one item of a stored stack nothing: the pages belong to the whole tensor, which releases them.
        """
        if self._item is None:
            for name in self.ref.sources:
                self._checkpoint.release(name)

    def _rows(self, name: str) -> np.ndarray:
        """The wanted bytes of one source."""
        ref, item = self._whole, self._item
        if ref.rows is None and not ref.transposed:
            if item is None:
                return self._checkpoint.raw(name)
            height = math.prod(self.shape[:-1])
            return self._checkpoint.rows(name, item * height, (item + 1) * height)
        slices = ref.rows or ((0, self.shape[-2], 1),)
        if ref.items:
            whole = replace(ref, shape=(*ref.shape[:-1], ref.height), rows=None, items=False)
            values = Weight(self._checkpoint, whole, item)._rows(name)
            return _joined([values.reshape(-1, ref.height, self._value_bytes())[:, slice(*s)] for s in slices])
        if item is not None and len(ref.shape) == 2:  # the item is a row
            row: np.ndarray = Weight(self._checkpoint, ref)._rows(name).reshape(ref.shape[0], -1)[item]
            return row
        items = range(math.prod(ref.shape[:-2]) if len(ref.sources) == 1 else 1) if item is None else [item]
        return _joined([self._matrix_rows(name, i, s) for i in items for s in slices], axis=0)

    def _matrix_rows(self, name: str, item: int, rows: RowSlice) -> np.ndarray:
        """Some rows of one matrix of a stack."""
        ref = self._whole
        start, stop, step = rows
        height = ref.height or ref.shape[-2]
        if not ref.transposed:
            # no more than the span, since reading may mean converting
            return self._checkpoint.rows(name, item * height + start, item * height + stop)[::step]
        size, cols = self._value_bytes(), ref.shape[-1]
        stored = self._checkpoint.rows(name, item * cols, (item + 1) * cols).reshape(cols, height, size)
        return np.ascontiguousarray(stored[:, start:stop:step].swapaxes(0, 1)).reshape(-1, cols * size)

    def _value_bytes(self) -> int:
        return get_format(self.format).block_bytes

    def _quantised(self) -> np.ndarray:
        if self._item is None and len(self.shape) > 2:
            return np.concatenate([self.part(i).raw() for i in range(self.shape[0])])
        where = f"{self._checkpoint.file_of(self.ref.sources[0])}: tensor '{self.ref.sources[0]}'"
        return _joined([quantize_rows(v, self.format, self.loss, where) for v in self._source_values()], axis=0)

    def _source_values(self) -> Iterator[torch.Tensor]:
        """float32 [some rows, cols] of what is to be quantised; of a plain matrix, a piece at a time."""
        ref, stored, cols = self._whole, self.ref.stored, self.shape[-1]
        assert stored is not None
        if ref.rows is not None or ref.transposed or get_format(stored).ordered:
            source = replace(ref, format=stored, stored=None)
            yield Weight(self._checkpoint, source, self._item).tensor().reshape(-1, cols)
            return
        height = math.prod(self.shape[:-1])
        first, step = (self._item or 0) * height, max(1, PIECE_VALUES // cols)
        for start in range(first, first + height, step):
            raw = self._checkpoint.rows(ref.sources[0], start, min(start + step, first + height))
            yield dequantize(stored, raw.reshape(-1), (len(raw), cols))


class _Subset(Weight):
    """Some items of another weight's first axis."""

    def __init__(self, checkpoint: Checkpoint, whole: Weight, indices: tuple[int, ...]) -> None:
        ref = replace(whole.ref, shape=(len(indices), *whole.shape[1:]))
        super().__init__(checkpoint, ref, loss=whole.loss)
        self._of = whole
        self._indices = indices

    @property
    def identity(self) -> str:
        return f"{self._of.identity}{list(self._indices)}"

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


def _joined(parts: list[np.ndarray], axis: int = 1) -> np.ndarray:
    return parts[0] if len(parts) == 1 else np.concatenate(parts, axis=axis)
