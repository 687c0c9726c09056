"""A checkpoint seen through a quantisation method: several stored tensors form one weight in a block format."""

from __future__ import annotations

import difflib
import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ktcore.errors import CheckpointError
from ktcore.weights.checkpoint import Checkpoint, TensorInfo
from ktcore.weights.formats import row_bytes

Bytes = npt.NDArray[np.uint8]

_NUMPY: dict[str, Any] = {
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype("<u2"),
    "I32": np.dtype("<i4"),
    "I64": np.dtype("<i8"),
    "I8": np.dtype("i1"),
    "U8": np.dtype("u1"),
    "F8_E4M3": np.dtype("u1"),
    "F8_E8M0": np.dtype("u1"),
}
"""Element types; those that numpy lacks are given by their bits."""


class LogicalWeight(ABC):
    """A weight made from stored tensors when it is asked for, and never kept.

    Attributes:
        info: name, shape, block format and size, as if it were stored so.
        sources: the stored tensors that it takes the place of, whether their bytes are used or not.
    """

    info: TensorInfo
    sources: tuple[str, ...]

    @abstractmethod
    def rows(self, start: int, stop: int) -> Bytes:
        """Rows start..stop in the block format, leading axes folded: uint8 [stop - start, row_bytes]."""

    def input_order(self) -> npt.NDArray[np.int64]:
        """See `Checkpoint.input_order`; only weights in an ordered format have one."""
        raise CheckpointError(f"'{self.info.name}' has its columns in place")


class ConvertedCheckpoint(Checkpoint):
    """The base's tensors, with those that belong to logical weights replaced by these.

    Args:
        unused: tensors that are left out.
    """

    def __init__(self, base: Checkpoint, weights: Iterable[LogicalWeight], unused: Iterable[str] = ()) -> None:
        self.path, self.kind, self.config = base.path, base.kind, base.config
        self._base = base
        self._weights = {weight.info.name: weight for weight in weights}
        gone = {source for weight in self._weights.values() for source in weight.sources}.union(unused)
        kept = {name: info for name, info in base.tensors.items() if name not in gone}
        self.tensors = kept | {name: weight.info for name, weight in self._weights.items()}

    def raw(self, name: str) -> Bytes:
        weight = self._weights.get(name)
        if weight is None:
            self._check(name)
            return self._base.raw(name)
        return weight.rows(0, math.prod(weight.info.shape[:-1])).reshape(-1)

    def rows(self, name: str, start: int, stop: int) -> Bytes:
        weight = self._weights.get(name)
        return self._base.rows(name, start, stop) if weight is None else weight.rows(start, stop)

    def take_rows(self, name: str, rows: npt.NDArray[np.int64]) -> Bytes:
        return super().take_rows(name, rows) if name in self._weights else self._base.take_rows(name, rows)

    def input_order(self, name: str) -> npt.NDArray[np.int64]:
        weight = self._weights.get(name)
        return self._base.input_order(name) if weight is None else weight.input_order()

    def file_of(self, name: str) -> Path:
        weight = self._weights.get(name)
        return self._base.file_of(name if weight is None else weight.sources[0])

    def ask_for(self, name: str) -> None:
        for source in self._sources(name):
            self._base.ask_for(source)

    def ask_for_rows(self, name: str, rows: npt.NDArray[np.int64]) -> None:
        if name not in self._weights:
            self._base.ask_for_rows(name, rows)

    def scattered(self, name: str) -> None:
        for source in self._sources(name):
            self._base.scattered(source)

    def release(self, name: str) -> None:
        for source in self._sources(name):
            self._base.release(source)

    def close(self) -> None:
        self._base.close()

    def _sources(self, name: str) -> Sequence[str]:
        self._check(name)
        weight = self._weights.get(name)
        return (name,) if weight is None else weight.sources

    def _check(self, name: str) -> None:
        if name not in self.tensors:
            close = difflib.get_close_matches(name, list(self.tensors)[:5000], n=3)
            hint = f"near names: {', '.join(close)}" if close else None
            raise CheckpointError(f"{self.path}: no tensor named {name!r}", hint)


class Stored:
    """One stored tensor of a checkpoint, its shape and type held against what a method demands.

    Args:
        formats: types that are allowed.
        shape: that it must have, where known.

    Raises:
        CheckpointError: it is absent, or something else; names file, tensor, expected and found.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        name: str,
        formats: Sequence[str],
        shape: Sequence[int] | None = None,
        owner: str | None = None,
    ) -> None:
        info = checkpoint.tensors.get(name)
        where = f"{checkpoint.path}: tensor '{name}'"
        if info is None:
            raise CheckpointError(
                f"{where} is missing, which belongs to '{owner}'" if owner else f"{where} is missing",
                "the checkpoint is incomplete, or quantised in another way than its config.json says",
            )
        if info.format not in formats:
            raise CheckpointError(f"{where} is {info.format}, expected {' or '.join(formats)}")
        if shape is not None and info.shape != tuple(shape):
            raise CheckpointError(f"{where} has shape {list(info.shape)}, expected {list(shape)}")
        self.name = name
        self.shape = info.shape
        self.format = info.format
        self.where = where
        self._checkpoint = checkpoint

    def read(self, start: int = 0, stop: int | None = None) -> npt.NDArray[Any]:
        """Elements by their bits, a view of the file in the tensor's shape; of two axes and more some rows."""
        dtype = _NUMPY[self.format]
        if len(self.shape) < 2:
            flat: npt.NDArray[Any] = self._checkpoint.raw(self.name).view(dtype).reshape(self.shape)
            return flat
        stop = math.prod(self.shape[:-1]) if stop is None else stop
        rows: npt.NDArray[Any] = self._checkpoint.rows(self.name, start, stop).view(dtype)
        return rows

    def floats(self) -> npt.NDArray[np.float32]:
        """Values as float32, in the tensor's shape; for small float tensors."""
        from ktcore.weights.formats import dequantize

        values: npt.NDArray[np.float32] = dequantize(
            self.format, self._checkpoint.raw(self.name).reshape(-1), self.shape
        ).numpy()
        return values


def logical_info(name: str, shape: Sequence[int], fmt: str) -> TensorInfo:
    """The header entry of a logical weight."""
    return TensorInfo(name, tuple(shape), fmt, math.prod(shape[:-1]) * row_bytes(fmt, shape[-1]))
