"""Memory-mapped files, and the checkpoint made of one or several of them that both readers return."""

from __future__ import annotations

import contextlib
import difflib
import math
import mmap
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ktcore.errors import CheckpointError
from ktcore.weights.checkpoint import Checkpoint, TensorInfo


class MappedFile:
    """A file mapped read-only.

    Raises:
        CheckpointError: the file is missing, empty, or cannot be mapped.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            if not path.is_file():
                raise CheckpointError(f"{path}: no such file")
            with path.open("rb") as file:
                self.size = file.seek(0, 2)
                if self.size == 0:
                    raise CheckpointError(f"{path}: the file is empty", "was the download cut short?")
                self._map: mmap.mmap | None = mmap.mmap(file.fileno(), self.size, access=mmap.ACCESS_READ)
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{path}: cannot be read: {error}") from error

    @property
    def map(self) -> mmap.mmap:
        """The map itself. Raises CheckpointError once the file is closed."""
        if self._map is None:
            raise CheckpointError(f"{self.path}: the checkpoint is closed")
        return self._map

    def view(self, offset: int, nbytes: int) -> npt.NDArray[np.uint8]:
        """A read-only, flat uint8 view of part of the file."""
        if nbytes == 0:
            return np.empty(0, dtype=np.uint8)
        return np.frombuffer(self.map, dtype=np.uint8, count=nbytes, offset=offset)

    def ask_for(self, offset: int, nbytes: int) -> None:
        """Have the system read this range into its cache where it can; Python's other threads run meanwhile."""
        if nbytes == 0 or not hasattr(os, "posix_fadvise"):
            return
        # by a descriptor, since mmap.madvise holds the interpreter's lock; a file that was moved away gets no advice
        with contextlib.suppress(OSError), self.path.open("rb") as file:
            os.posix_fadvise(file.fileno(), offset, nbytes, os.POSIX_FADV_WILLNEED)

    def ask_for_parts(self, offsets: npt.NDArray[np.int64], nbytes: int) -> None:
        """The same of many small parts of `nbytes` each."""
        if nbytes == 0 or not hasattr(os, "posix_fadvise"):
            return
        first, last = offsets // mmap.PAGESIZE, (offsets + nbytes - 1) // mmap.PAGESIZE
        pages = np.unique(np.concatenate([first + i for i in range(int((last - first).max(initial=0)) + 1)]))
        with contextlib.suppress(OSError), self.path.open("rb") as file:
            for page in pages.tolist():
                os.posix_fadvise(file.fileno(), page * mmap.PAGESIZE, mmap.PAGESIZE, os.POSIX_FADV_WILLNEED)

    def scattered(self, offset: int, nbytes: int) -> None:
        """Read no more of this range than is touched."""
        if nbytes and hasattr(self.map, "madvise") and hasattr(mmap, "MADV_RANDOM"):
            start = offset - offset % mmap.PAGESIZE
            self.map.madvise(mmap.MADV_RANDOM, start, min(offset + nbytes, self.size) - start)

    def release(self, offset: int, nbytes: int) -> None:
        """Drop the pages of this range from the process where the system can; they are read again on next use."""
        if nbytes == 0 or not hasattr(self.map, "madvise") or not hasattr(mmap, "MADV_DONTNEED"):
            return
        # Rounding outwards is safe: the map is read-only, so a neighbour's dropped page holds nothing to lose.
        start = offset - offset % mmap.PAGESIZE
        self.map.madvise(mmap.MADV_DONTNEED, start, min(offset + nbytes, self.size) - start)

    def close(self) -> None:
        """Unmap; if views are alive the map goes with the last of them."""
        mapped, self._map = self._map, None
        if mapped is None:
            return
        # While a view points into it, closing is refused, and the view's reference keeps the map alive.
        with contextlib.suppress(BufferError):
            mapped.close()


@dataclass(frozen=True)
class StoredTensor:
    """A tensor and where its bytes are."""

    info: TensorInfo
    file: MappedFile
    offset: int


class MappedCheckpoint(Checkpoint):
    """A checkpoint whose tensors lie in mapped files."""

    def __init__(
        self,
        path: Path,
        kind: str,
        config: Mapping[str, Any],
        tensors: Mapping[str, StoredTensor],
        files: tuple[MappedFile, ...],
    ) -> None:
        self.path = path
        self.kind = kind
        self.config = config
        self.tensors = {name: stored.info for name, stored in tensors.items()}
        self._stored = tensors
        self._files = files

    def raw(self, name: str) -> npt.NDArray[np.uint8]:
        stored = self._find(name)
        return stored.file.view(stored.offset, stored.info.nbytes)

    def file_of(self, name: str) -> Path:
        return self._find(name).file.path

    def ask_for(self, name: str) -> None:
        stored = self._find(name)
        stored.file.ask_for(stored.offset, stored.info.nbytes)

    def take_rows(self, name: str, rows: npt.NDArray[np.int64]) -> npt.NDArray[np.uint8]:
        return self.rows(name, 0, math.prod(self.tensors[name].shape[:-1]))[rows]

    def ask_for_rows(self, name: str, rows: npt.NDArray[np.int64]) -> None:
        stored = self._find(name)
        width = stored.info.nbytes // max(1, math.prod(stored.info.shape[:-1]))
        stored.file.ask_for_parts(stored.offset + rows * width, width)

    def scattered(self, name: str) -> None:
        stored = self._find(name)
        stored.file.scattered(stored.offset, stored.info.nbytes)

    def release(self, name: str) -> None:
        stored = self._find(name)
        stored.file.release(stored.offset, stored.info.nbytes)

    def close(self) -> None:
        for file in self._files:
            file.close()

    def _find(self, name: str) -> StoredTensor:
        try:
            return self._stored[name]
        except KeyError:
            close = difflib.get_close_matches(name, list(self._stored)[:5000], n=3)
            hint = f"near names: {', '.join(close)}" if close else None
            raise CheckpointError(f"{self.path}: no tensor named {name!r}", hint) from None
