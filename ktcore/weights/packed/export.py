"""What a packed folder holds besides packed parts, so that it runs without its source."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ktcore.weights.checkpoint import Checkpoint
from ktcore.weights.formats import get_format
from ktcore.weights.gguf import GgufCheckpoint
from ktcore.weights.joined import JoinedCheckpoint
from ktcore.weights.packed.container import METADATA, TENSOR_ALIGNMENT, TENSORS, aligned, digest, write_error

COPIED = (".json", ".jinja", ".model", ".tiktoken", ".txt")
"""Endings of the small files of a model folder: configuration, tokenizer, chat templates."""
LEFT_OUT = (".safetensors.index.json", ".bin.index.json")
LARGEST_COPY = 256 * 1024 * 1024


class ReadLog(Checkpoint):
    """A checkpoint that notes whose bytes are read while `watching`."""

    def __init__(self, base: Checkpoint) -> None:
        self.base = base
        self.path, self.kind, self.config, self.tensors = base.path, base.kind, base.config, base.tensors
        self.watching = True
        self.read: dict[str, None] = {}

    def raw(self, name: str) -> npt.NDArray[np.uint8]:
        self._note(name)
        return self.base.raw(name)

    def rows(self, name: str, start: int, stop: int) -> npt.NDArray[np.uint8]:
        self._note(name)
        return self.base.rows(name, start, stop)

    def take_rows(self, name: str, rows: npt.NDArray[np.int64]) -> npt.NDArray[np.uint8]:
        self._note(name)
        return self.base.take_rows(name, rows)

    def input_order(self, name: str) -> npt.NDArray[np.int64]:
        self._note(name)
        return self.base.input_order(name)

    def file_of(self, name: str) -> Path:
        return self.base.file_of(name)

    def ask_for(self, name: str) -> None:
        self.base.ask_for(name)

    def scattered(self, name: str) -> None:
        # rows of it are read from here when the model runs
        self._note(name)
        self.base.scattered(name)

    def release(self, name: str) -> None:
        self.base.release(name)

    def close(self) -> None:
        self.base.close()

    def _note(self, name: str) -> None:
        if self.watching:
            self.read[name] = None


def keep_tensors(folder: Path, checkpoint: Checkpoint, names: Iterable[str]) -> dict[str, Any]:
    """Write tensors as they are; gives the manifest's entries of them.

    Raises:
        CheckpointError: they cannot be written.
    """
    path, kept, at = folder / TENSORS, {}, 0
    try:
        with path.open("wb") as file:
            for name in names:
                for label, data in _stored(checkpoint, name):
                    at = aligned(at, TENSOR_ALIGNMENT)
                    file.seek(at)
                    file.write(data.data)
                    kept[label] = {"name": label, "offset": at, "nbytes": data.nbytes, "sum": digest(data)}
                    at += data.nbytes
                checkpoint.release(name)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise write_error(path, error) from error
    return kept


def describe_source(folder: Path, checkpoint: Checkpoint) -> dict[str, Any]:
    """The manifest's entries of the source, whose small files are copied.

    Raises:
        CheckpointError: they cannot be written.
    """
    if isinstance(checkpoint, JoinedCheckpoint):
        return {
            "source": _one_source(folder, checkpoint.base, METADATA),
            "experts_source": _one_source(folder, checkpoint.experts, f"experts-{METADATA}"),
        }
    return {"source": _one_source(folder, checkpoint, METADATA)}


def _one_source(folder: Path, checkpoint: Checkpoint, metadata: str) -> dict[str, Any]:
    tensors = [(i.name, i.shape, i.format, i.nbytes) for i in checkpoint.tensors.values()]
    entry: dict[str, Any] = {"kind": checkpoint.kind, "path": str(checkpoint.path), "tensors": tensors}
    try:
        if isinstance(checkpoint, GgufCheckpoint):
            (folder / metadata).write_bytes(checkpoint.metadata)
            return {**entry, "metadata": metadata}
        if metadata == METADATA:
            for path in sorted(checkpoint.path.iterdir()):
                if _is_small(path):
                    shutil.copyfile(path, folder / path.name)
                elif path.is_dir() and path.name == "additional_chat_templates":
                    shutil.copytree(path, folder / path.name, dirs_exist_ok=True)
        return {**entry, "config": dict(checkpoint.config)}
    except OSError as error:
        raise write_error(folder, error) from error


def _is_small(path: Path) -> bool:
    fits = path.name.endswith(COPIED) and not path.name.endswith(LEFT_OUT)
    return fits and path.is_file() and path.stat().st_size <= LARGEST_COPY


def _stored(checkpoint: Checkpoint, name: str) -> list[tuple[str, npt.NDArray[np.uint8]]]:
    found = [(name, np.ascontiguousarray(checkpoint.raw(name)).reshape(-1))]
    if get_format(checkpoint.tensors[name].format).ordered:
        found.append((f"{name}:order", np.ascontiguousarray(checkpoint.input_order(name)).view(np.uint8).reshape(-1)))
    return found
