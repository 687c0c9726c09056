"""What a checkpoint offers, whatever its file format."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from ktcore.errors import CheckpointError

if TYPE_CHECKING:
    from typing_extensions import Self

GGUF_MAGIC = b"GGUF"
PACKED_MANIFEST = "ktcore-packed.json"
"""What a folder that `ktcore convert` wrote holds."""


@dataclass(frozen=True)
class TensorInfo:
    """One stored tensor, as its header describes it.

    Args:
        name: its name in the file.
        shape: torch order, ``[out, in]``; the last dimension is contiguous.
        format: name of its weight format (:func:`ktcore.weights.get_format`).
        nbytes: bytes it takes in the file.
    """

    name: str
    shape: tuple[int, ...]
    format: str
    nbytes: int


class Checkpoint(ABC):
    """An open model file or folder: configuration and tensor list at hand, tensor bytes mapped, nothing copied.

    Attributes:
        path: what was opened.
        kind: ``"gguf"`` or ``"hf"``.
        config: GGUF key-value metadata, or config.json, as plain Python values. Long arrays (vocabularies) are
            sequences that decode themselves on first use.
        tensors: name to :class:`TensorInfo`, in file order.
        weightless: there is a configuration only; it says what tensors there would be.
    """

    path: Path
    kind: str
    config: Mapping[str, Any]
    tensors: Mapping[str, TensorInfo]
    weightless: bool = False

    @property
    def nbytes(self) -> int:
        """Bytes of tensor data in the file or files."""
        return sum(info.nbytes for info in self.tensors.values())

    def holds(self, name: str) -> bool:
        """Whether there is a tensor of that name."""
        return name in self.tensors

    def file_of(self, name: str) -> Path:
        """The file that holds a tensor."""
        return self.path

    def expect(self, name: str, shape: tuple[int, ...]) -> None:  # noqa: B027
        """Told what the configuration says of a tensor before it is looked up; only one without weights listens."""

    @abstractmethod
    def raw(self, name: str) -> npt.NDArray[np.uint8]:
        """The tensor's bytes: flat uint8, read-only, a view of the memory map.

        Raises:
            CheckpointError: there is no such tensor, or the checkpoint is closed.
        """

    def rows(self, name: str, start: int, stop: int) -> npt.NDArray[np.uint8]:
        """Rows start..stop, all axes but the last folded: uint8 [stop - start, row_bytes], a view where it can be."""
        info = self.tensors[name]
        height = math.prod(info.shape[:-1])
        return self.raw(name).reshape(height, -1)[start:stop]

    def take_rows(self, name: str, rows: npt.NDArray[np.int64]) -> npt.NDArray[np.uint8]:
        """Some rows, a copy: uint8 [n, row_bytes]. Nothing else is read where a tensor is stored as it is."""
        return np.concatenate([self.rows(name, row, row + 1) for row in rows.tolist()])

    def input_order(self, name: str) -> npt.NDArray[np.int64]:
        """Of a tensor in an ordered format: the input that each stored column belongs to, int64 [in]."""
        raise CheckpointError(f"{self.path}: '{name}' has its columns in place")

    def ask_for(self, name: str) -> None:  # noqa: B027
        """Tell the system that this tensor is read soon, so that it comes from the disk meanwhile; from any thread."""

    def ask_for_rows(self, name: str, rows: npt.NDArray[np.int64]) -> None:  # noqa: B027
        """The same of some rows of a tensor, all axes but the last folded."""

    def scattered(self, name: str) -> None:  # noqa: B027
        """Told when rows of this tensor are read here and there: the system need read none around them."""

    @abstractmethod
    def release(self, name: str) -> None:
        """Let the system drop this tensor's pages from memory; reading it again brings them back from the file."""

    @abstractmethod
    def close(self) -> None:
        """Give up the memory map. Views that are still alive keep their own file mapped until they go."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
