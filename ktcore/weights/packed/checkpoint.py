"""A folder that `ktcore convert` wrote, as a checkpoint: the source's configuration and tensor list, packed weights."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ktcore.errors import CheckpointError
from ktcore.weights.checkpoint import Checkpoint, TensorInfo
from ktcore.weights.gguf_header import read_header
from ktcore.weights.joined import PREFIX
from ktcore.weights.mapped import MappedFile
from ktcore.weights.packed.container import TENSORS, read_manifest
from ktcore.weights.packed.reader import PartReader


class PackedCheckpoint(Checkpoint):
    """Tensors that are read unpacked are mapped; the others are there by name only, their values in packed parts.

    Attributes:
        parts: the packed parts.
        quantized: node name -> format that the source's weights of that node were quantised to.
        others: the checkpoint that the routed experts came from, where it was another one.
    """

    def __init__(self, folder: Path, body: Mapping[str, Any], parts: PartReader, file: MappedFile | None) -> None:
        self.path = folder
        self.parts = parts
        self.quantized: Mapping[str, str] = body["quantized"]
        self._file = file
        self._kept: Mapping[str, Any] = body["kept"]
        self._prefix = ""
        self._metadata: MappedFile | None = None
        self._describe(body["source"])
        self.others: PackedCheckpoint | None = None
        if body.get("experts_source"):
            self.others = object.__new__(PackedCheckpoint)
            self.others.__dict__.update(vars(self), others=None, quantized={}, _prefix=PREFIX)
            self.others._describe(body["experts_source"])

    def raw(self, name: str) -> npt.NDArray[np.uint8]:
        return self._view(name)

    def take_rows(self, name: str, rows: npt.NDArray[np.int64]) -> npt.NDArray[np.uint8]:
        return self.rows(name, 0, math.prod(self.tensors[name].shape[:-1]))[rows]

    def input_order(self, name: str) -> npt.NDArray[np.int64]:
        return self._view(f"{name}:order").view(np.int64)

    def file_of(self, name: str) -> Path:
        return self.path / TENSORS

    def scattered(self, name: str) -> None:
        entry = self._kept.get(self._prefix + name)
        if entry is not None and self._file is not None:
            self._file.scattered(entry["offset"], entry["nbytes"])

    def ask_for_rows(self, name: str, rows: npt.NDArray[np.int64]) -> None:
        entry = self._kept.get(self._prefix + name)
        if entry is not None and self._file is not None:
            width = entry["nbytes"] // max(1, math.prod(self.tensors[name].shape[:-1]))
            self._file.ask_for_parts(entry["offset"] + rows * width, width)

    def release(self, name: str) -> None:
        entry = self._kept.get(self._prefix + name)
        if entry is not None and self._file is not None:
            self._file.release(entry["offset"], entry["nbytes"])

    def close(self) -> None:
        self.parts.close()
        for file in (self._file, self._metadata):
            if file is not None:
                file.close()
        if self.others is not None:
            self.others.close()

    def _describe(self, source: Mapping[str, Any]) -> None:
        self.kind = source["kind"]
        if self.kind == "gguf":
            self._metadata = MappedFile(self.path / source["metadata"])
            self.config = read_header(self._metadata).metadata
        else:
            self.config = source["config"]
        self.tensors = {
            name: TensorInfo(name, tuple(shape), fmt, nbytes) for name, shape, fmt, nbytes in source["tensors"]
        }

    def _view(self, name: str) -> npt.NDArray[np.uint8]:
        entry = self._kept.get(self._prefix + name)
        if entry is None:
            raise CheckpointError(
                f"{self.path}: '{name}' is not kept here in a form that this plan reads, only packed for another one",
                "load it with the backend and rules that it was converted for, or convert the model again with these",
            )
        assert self._file is not None
        return self._file.view(entry["offset"], entry["nbytes"])


def open_packed(folder: Path) -> PackedCheckpoint:
    """Open a folder that `ktcore convert` wrote; reads the manifest only.

    Raises:
        CheckpointError: damaged, incomplete, of another version, or a cache entry, which is no model by itself.
    """
    body = read_manifest(folder)
    if body.get("source") is None:
        raise CheckpointError(f"{folder}: an entry of a packed-weight cache, which needs its model", "give the model")
    file = MappedFile(folder / TENSORS) if body["files"].get(TENSORS) else None
    return PackedCheckpoint(folder, body, PartReader(folder, body), file)
