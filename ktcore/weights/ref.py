"""Where a weight lives in a checkpoint (`WeightRef`, header knowledge only) and the opened thing (`Weight`)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch

from ktcore.errors import CheckpointError
from ktcore.weights.formats import dequantize, row_bytes

if TYPE_CHECKING:
    from ktcore.weights.checkpoint import Checkpoint


@dataclass(frozen=True)
class WeightRef:
    """A weight by name, made from one or several tensors of a checkpoint without reading them.

    Attributes:
        sources: tensor names; several are stacked along a new first axis (one tensor an expert).
        shape: torch order [..., out, in] after stacking and slicing; may reshape a single source.
        format: weight format of the stored bytes.
        rows: slice of the second to last axis, or of a vector's only one, for the parts of a fused tensor; None takes
            all.
    """

    sources: tuple[str, ...]
    shape: tuple[int, ...]
    format: str
    rows: tuple[int, int] | None = None

    @property
    def nbytes(self) -> int:
        """Stored bytes of this weight."""
        count = 1
        for n in self.shape[:-1]:
            count *= n
        return count * row_bytes(self.format, self.shape[-1])

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

    def slice_rows(self, start: int, stop: int) -> WeightRef:
        """Rows start..stop of the second to last axis; of a vector, its items."""
        if len(self.shape) == 1:
            return replace(self, shape=(stop - start,), rows=(start, stop))
        return replace(self, shape=(*self.shape[:-2], stop - start, self.shape[-1]), rows=(start, stop))

    def open(self, checkpoint: Checkpoint) -> Weight:
        """The weight's bytes; nothing is read from disk before they are touched."""
        return Weight(checkpoint, self)


class Weight:
    """An opened weight: raw bytes as stored, or float32 values."""

    def __init__(self, checkpoint: Checkpoint, ref: WeightRef) -> None:
        self._checkpoint = checkpoint
        self.ref = ref

    @property
    def shape(self) -> tuple[int, ...]:
        """Torch order [..., out, in]."""
        return self.ref.shape

    @property
    def format(self) -> str:
        """Name of the weight format of `raw()`."""
        return self.ref.format

    def raw(self) -> np.ndarray:
        """Stored bytes, uint8 [rows, row_bytes] with all leading axes folded; a view of the file where it can be."""
        width = row_bytes(self.format, self.shape[-1])
        parts = [self._rows(name, width) for name in self.ref.sources]
        return parts[0].reshape(-1, width) if len(parts) == 1 else np.concatenate([p.reshape(-1, width) for p in parts])

    def tensor(self) -> torch.Tensor:
        """Dequantised values, float32 in `shape`."""
        return dequantize(self.format, self.raw(), self.shape)

    def part(self, index: int) -> Weight:
        """Item `index` of the first axis (one expert), opened on its own."""
        shape = self.shape[1:]
        if len(self.ref.sources) > 1:
            return Weight(self._checkpoint, WeightRef((self.ref.sources[index],), shape, self.format, self.ref.rows))
        return _Item(self._checkpoint, self.ref, index)

    def subset(self, indices: Sequence[int]) -> Weight:
        """Items `indices` of the first axis, as a weight of its own."""
        return _Subset(self._checkpoint, self, tuple(indices))

    def release(self) -> None:
        """Let the operating system drop this weight's file pages from memory; reading again brings them back."""
        for name in self.ref.sources:
            self._checkpoint.release(name)

    def _rows(self, name: str, width: int) -> np.ndarray:
        raw = self._checkpoint.raw(name)
        if self.ref.rows is None:
            return raw
        start, stop = self.ref.rows
        if len(self.shape) == 1:
            item = row_bytes(self.format, 1)
            return raw.reshape(-1)[start * item : stop * item]
        stored_rows = self._checkpoint.tensors[name].shape[-2]
        return raw.reshape(-1, stored_rows, width)[:, start:stop]


class _Item(Weight):
    """One item of the first axis of a single stored tensor."""

    def __init__(self, checkpoint: Checkpoint, ref: WeightRef, index: int) -> None:
        super().__init__(checkpoint, replace(ref, shape=ref.shape[1:]))
        self._whole = ref
        self._index = index

    def raw(self) -> np.ndarray:
        width = row_bytes(self.format, self.shape[-1])
        rows = self._rows(self._whole.sources[0], width).reshape(self._whole.shape[0], -1, width)
        item: np.ndarray = rows[self._index]
        return item

    def release(self) -> None:
        """Nothing: the file pages belong to the whole tensor, which releases them."""


class _Subset(Weight):
    """Some items of another weight's first axis."""

    def __init__(self, checkpoint: Checkpoint, whole: Weight, indices: tuple[int, ...]) -> None:
        super().__init__(checkpoint, replace(whole.ref, shape=(len(indices), *whole.shape[1:])))
        self._whole = whole
        self._indices = indices

    def raw(self) -> np.ndarray:
        return np.concatenate([self._whole.part(i).raw() for i in self._indices])

    def part(self, index: int) -> Weight:
        return self._whole.part(self._indices[index])

    def subset(self, indices: Sequence[int]) -> Weight:
        return self._whole.subset([self._indices[i] for i in indices])

    def release(self) -> None:
        self._whole.release()
