"""Maps the packed parts of a finished folder, and reads them through where their checksums are to be verified."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ktcore.errors import CheckpointError
from ktcore.weights.packed.container import AGAIN, PARTS, TENSORS, digest, map_range
from ktcore.weights.packed.parts import Bytes, Fill, PackedParts, Part
from ktcore.weights.packed.populate import Populate


class PackedMismatch(CheckpointError):
    """Packed weights on disk are damaged, or not those that are asked for."""


class PartReader(PackedParts):
    """Parts of a finished folder.

    Args:
        body: its manifest.
    """

    complete = True

    def __init__(self, folder: Path, body: Mapping[str, Any]) -> None:
        self.folder = folder
        self._parts: Mapping[str, dict[str, Any]] = body["parts"]
        self._file = os.open(folder / PARTS, os.O_RDONLY)
        self._ahead: Populate | None = None

    def get(self, part: Part, fill: Fill) -> Bytes | None:
        entry = self._parts.get(part.key)
        if entry is None:
            self._refuse_other_packing(part)
            return None
        if entry["layout"] != part.layout:
            raise PackedMismatch(
                f"{self.folder}: {part.what} is packed in layout {entry['layout']}, this ktcore reads {part.layout}",
                f"{AGAIN}, or use the ktcore that wrote it",
            )
        if (entry["pieces"], entry["nbytes"], entry["kind"]) != (part.pieces, part.nbytes, part.kind):
            raise PackedMismatch(
                f"{self.folder}: {part.what} is packed as {entry['pieces']} x {entry['nbytes']} bytes, expected "
                f"{part.pieces} x {part.nbytes}",
                AGAIN,
            )
        for weight, (error, value) in zip(part.weights, entry["losses"], strict=True):
            weight.loss.error += error
            weight.loss.value += value
        mapped = map_range(self._file, entry["offset"], part.pieces * part.nbytes)
        if self._ahead is not None:
            self._ahead.add(mapped)
        return np.frombuffer(mapped, np.uint8).reshape(part.pieces, part.nbytes)

    def populate(self, room: int) -> None:
        if os.fstat(self._file).st_size <= room:
            self._ahead = Populate()

    def _refuse_other_packing(self, part: Part) -> None:
        """The same weights lie here in another form of the layout: nobody wants them packed anew each time."""
        name = part.layout.partition("/")[0]
        for entry in self._parts.values():
            same = (entry["what"], entry["layout"].partition("/")[0], entry["pieces"]) == (part.what, name, part.pieces)
            if same and entry["kind"] != part.kind:
                raise PackedMismatch(
                    f"{self.folder}: {part.what} is packed as '{entry['kind']}', this plan wants '{part.kind}'",
                    f"ask for the rules and the packing that it was written with, or {AGAIN}",
                )

    def close(self) -> None:
        """Close the file; mapped parts stay."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1


def verify(folder: Path, body: Mapping[str, Any], progress: Callable[[int, int], None] | None = None) -> list[str]:
    """Read everything and hold it against its checksums; what does not fit, in words.

    Args:
        progress: called with bytes read and bytes in all.
    """
    damaged = []
    total = sum(body["files"].get(name, 0) for name in (PARTS, TENSORS))
    done = 0
    for name, what, offset, nbytes, expected in _summed(body):
        with (folder / name).open("rb") as file:
            file.seek(offset)
            if digest(file.read(nbytes)) != expected:
                damaged.append(what)
        done += nbytes
        if progress is not None:
            progress(done, total)
    return damaged


def _summed(body: Mapping[str, Any]) -> Iterator[tuple[str, str, int, int, str]]:
    for entry in body["parts"].values():
        for i, expected in enumerate(entry["sums"]):
            what = entry["what"] if entry["pieces"] == 1 else f"{entry['what']}, piece {i}"
            yield PARTS, what, entry["offset"] + i * entry["nbytes"], entry["nbytes"], expected
    for entry in body.get("kept", {}).values():
        yield TENSORS, f"tensor {entry['name']}", entry["offset"], entry["nbytes"], entry["sum"]
