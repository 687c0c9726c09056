"""Writes packed parts beside their final place, a piece at a time, so that a kill costs no more than two pieces."""

from __future__ import annotations

import json
import os
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from ktcore.weights.packed.container import PAGE, PARTS, aligned, canonical, digest, map_range, write_error
from ktcore.weights.packed.parts import Bytes, Fill, PackedParts, Part
from ktcore.weights.packed.reader import PackedMismatch

JOURNAL = "journal.jsonl"
Losses = list[tuple[float, float]]


class PartWriter(PackedParts):
    """Parts that are written as they are asked for, and mapped from where they were written.

    A thread writes a piece and sums it up while the next one is packed. The journal's first line names what is being
    written; each later one is a part with its place, or a finished piece with its checksum. Pieces of an earlier run
    are read and held against their checksums before they count.

    Args:
        folder: unfinished; made when it is not there.
        identity: of the source and of the plan; must equal that of the earlier run.

    Raises:
        CheckpointError: the folder cannot be written, or holds an unfinished run of something else.
    """

    def __init__(self, folder: Path, identity: dict[str, Any]) -> None:
        self.folder = folder
        self.parts: dict[str, dict[str, Any]] = {}
        self.resumed = 0
        """Bytes of pieces that an earlier run had finished."""
        self._end = 0
        self._thread = ThreadPoolExecutor(1, "ktcore-part-writer")
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._file = os.open(folder / PARTS, os.O_RDWR | os.O_CREAT, 0o644)
            self._journal = (folder / JOURNAL).open("a+b")
        except OSError as error:
            raise write_error(folder, error) from error
        self._resume(identity)

    def get(self, part: Part, fill: Fill) -> Bytes | None:
        entry = self.parts.get(part.key)
        if entry is None:
            entry = self._place(part)
        if entry["layout"] != part.layout:
            raise PackedMismatch(
                f"{self.folder}: an unfinished run in layout {entry['layout']}, this ktcore writes {part.layout}",
                f"delete {self.folder}",
            )
        writing: tuple[Future[str], Losses] | None = None
        try:
            for piece in range(len(entry["sums"]), part.pieces):
                before = [(w.loss.error, w.loss.value) for w in part.weights]
                data = np.ascontiguousarray(fill(piece)).reshape(-1)
                if data.nbytes != part.nbytes:
                    raise ValueError(
                        f"{part.what}: piece {piece} has {data.nbytes} bytes, announced were {part.nbytes}"
                    )
                losses = [
                    (w.loss.error - old[0], w.loss.value - old[1]) for w, old in zip(part.weights, before, strict=True)
                ]
                earlier, writing = writing, None
                self._finish(part, earlier)
                writing = self._thread.submit(self._store, entry["offset"] + piece * part.nbytes, data), losses
        finally:
            self._finish(part, writing)
        return _view(self._file, entry)

    def close(self) -> None:
        """Close the files; mapped parts stay."""
        self._thread.shutdown()
        if self._file >= 0:
            os.close(self._file)
            self._journal.close()
            self._file = -1

    def flush(self) -> None:
        """Wait until all is on the disk."""
        try:
            os.fsync(self._file)
        except OSError as error:
            raise write_error(self.folder, error) from error

    @property
    def nbytes(self) -> int:
        """Bytes of the parts' file."""
        return self._end

    def _place(self, part: Part) -> dict[str, Any]:
        place: dict[str, Any] = {
            "part": part.key,
            "what": part.what,
            "layout": part.layout,
            "kind": part.kind,
            "offset": aligned(self._end, PAGE),
            "pieces": part.pieces,
            "nbytes": part.nbytes,
        }
        end = aligned(place["offset"] + part.pieces * part.nbytes, PAGE)
        try:
            # a full disk is an error here, not a signal when a page of the map is touched
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(self._file, self._end, end - self._end)
            else:
                os.truncate(self._file, end)
        except OSError as error:
            raise write_error(self.folder / PARTS, error) from error
        self._note(place)
        return self._count(place)

    def _finish(self, part: Part, writing: tuple[Future[str], Losses] | None) -> None:
        """Wait until a piece is written, then note it."""
        if writing is None:
            return
        line = {"piece": part.key, "sum": writing[0].result(), "losses": writing[1]}
        self._note(line)
        self._count(line)

    def _store(self, offset: int, data: Bytes) -> str:
        """Write a piece; gives its checksum. Runs beside the packing of the next one."""
        self._write(offset, data)
        return digest(data)

    def _write(self, offset: int, data: Bytes) -> None:
        rest = data.data
        try:
            while rest:
                done = os.pwrite(self._file, rest, offset)
                rest, offset = rest[done:], offset + done
        except OSError as error:
            raise write_error(self.folder / PARTS, error) from error

    def _note(self, line: dict[str, Any]) -> None:
        try:
            self._journal.write(json.dumps(line).encode() + b"\n")
            self._journal.flush()
        except OSError as error:
            raise write_error(self.folder / JOURNAL, error) from error

    def _count(self, line: dict[str, Any]) -> dict[str, Any]:
        """Take a line of the journal for true."""
        if "part" in line:
            entry = {**line, "sums": [], "losses": []}
            self._end = aligned(line["offset"] + line["pieces"] * line["nbytes"], PAGE)
            return self.parts.setdefault(line["part"], entry)
        entry = self.parts[line["piece"]]
        entry["sums"].append(line["sum"])
        old = entry["losses"] or [(0.0, 0.0)] * len(line["losses"])
        entry["losses"] = [(a + c, b + d) for (a, b), (c, d) in zip(old, line["losses"], strict=True)]
        return entry

    def _resume(self, identity: dict[str, Any]) -> None:
        self._journal.seek(0)
        lines = self._journal.read().split(b"\n")[:-1]  # a last line without its end was being written
        if not lines:
            self._journal.truncate(0)
            self._note({"identity": identity})
            return
        try:
            found = json.loads(lines[0])["identity"]
        except (ValueError, KeyError, TypeError):
            found = {}
        differs = sorted(k for k in {*identity, *found} if canonical(identity.get(k)) != canonical(found.get(k)))
        if differs:
            raise PackedMismatch(
                f"{self.folder}: holds an unfinished run that differs in: {', '.join(differs)}",
                f"repeat the command that began it, or delete {self.folder}",
            )
        good = len(lines[0]) + 1
        for raw in lines[1:]:
            if not self._believe(raw):
                break
            good += len(raw) + 1
        self._journal.truncate(good)

    def _believe(self, raw: bytes) -> bool:
        try:
            line = json.loads(raw)
            if "piece" in line:
                entry = self.parts[line["piece"]]
                at = entry["offset"] + len(entry["sums"]) * entry["nbytes"]
                if digest(os.pread(self._file, entry["nbytes"], at)) != line["sum"]:
                    return False
                self.resumed += entry["nbytes"]
            self._count(line)
        except (ValueError, KeyError, TypeError):
            return False
        return True


def _view(file: int, entry: dict[str, Any]) -> Bytes:
    mapped = map_range(file, entry["offset"], entry["pieces"] * entry["nbytes"])
    return np.frombuffer(mapped, np.uint8).reshape(entry["pieces"], entry["nbytes"])
