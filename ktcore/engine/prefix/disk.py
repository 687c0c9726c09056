"""The tier on disk: a file a content, written by a thread of its own, checked when read, kept over restarts.

A process may be killed at any moment: files appear under their names by renaming, and carry a checksum of what they
hold, so that a torn one is as good as none.
"""

from __future__ import annotations

import hashlib
import logging
import os
import queue
import struct
import threading
from collections import OrderedDict
from pathlib import Path

import torch

from ktcore.errors import RequestError

LOG = logging.getLogger("ktcore")
MAGIC = b"ktcoreKV"
VERSION = 1
SUFFIX, PARTIAL = ".kv", ".partial"
WAITING = 256
"""Contents that may wait for the writer; beyond, they are not written."""
_HEAD = struct.Struct("<8sIQ16s16s")  # magic, version, bytes, name, BLAKE2b of the content


class DiskTier:
    """Contents of one model and layout in a folder of their own, below `folder`.

    Several processes may share it; the bound holds for what each of them has seen there.

    Args:
        identity: hexadecimal name of model and layout; files of others count towards the bound too, and go as those do.
        limit: bytes of all files below `folder`.

    Raises:
        RequestError: the folder cannot be used.
    """

    def __init__(self, folder: Path, identity: str, limit: int) -> None:
        self.limit = limit
        self.dropped = 0
        self._place = folder / identity
        self._lock = threading.Lock()
        self._held: OrderedDict[Path, int] = OrderedDict()
        self._bytes = 0
        self._tasks: queue.Queue[tuple[bytes, torch.Tensor] | None] = queue.Queue(WAITING)
        try:
            self._place.mkdir(parents=True, exist_ok=True)
            self._scan(folder)
            self._prune()
        except OSError as error:
            raise RequestError(
                f"the prefix cache's folder {folder} cannot be used: {error}", "give another one, or none"
            ) from error
        self._thread = threading.Thread(target=self._write_all, name="ktcore-prefix-disk", daemon=True)
        self._thread.start()

    @property
    def used(self) -> int:
        """Bytes of the files that are known."""
        return self._bytes

    def __contains__(self, name: bytes) -> bool:
        with self._lock:
            return self._path(name) in self._held

    def get(self, name: bytes) -> torch.Tensor | None:
        """The content uint8 [bytes], from any thread; None where there is none, or a damaged one, which goes."""
        path = self._path(name)
        try:
            with path.open("rb", buffering=0) as file:
                head = file.read(_HEAD.size)
                content = torch.empty(max(0, os.fstat(file.fileno()).st_size - _HEAD.size), dtype=torch.uint8)
                read = file.readinto(content.numpy().data) if content.numel() else 0
            os.utime(path)
        except OSError:  # another process removed it
            self._forget(path)
            return None
        if read != content.numel() or not _fits(head, name, content):
            LOG.warning("prefix cache: %s is damaged and goes", path)
            path.unlink(missing_ok=True)
            self._forget(path)
            return None
        with self._lock:
            if path in self._held:
                self._held.move_to_end(path)
        return content

    def put(self, name: bytes, content: torch.Tensor) -> None:
        """Have uint8 [bytes] written; a content that comes while too many wait is not."""
        if name in self or content.numel() + _HEAD.size > self.limit:
            return
        try:
            self._tasks.put_nowait((name, content))
        except queue.Full:
            self.dropped += 1

    def close(self) -> None:
        """Write what waits, and end the thread."""
        self._tasks.put(None)
        self._thread.join()

    def _path(self, name: bytes) -> Path:
        text = name.hex()
        return self._place / text[:2] / f"{text}{SUFFIX}"

    def _scan(self, folder: Path) -> None:
        found = []
        for path in folder.glob("*/*/*"):
            if path.name.endswith(PARTIAL):
                # a process that was killed left it, or one that runs: that one's renaming fails, and costs one content
                path.unlink(missing_ok=True)
            elif path.name.endswith(SUFFIX):
                stat = path.stat()
                found.append((stat.st_mtime_ns, stat.st_size, path))
        for _, size, path in sorted(found):
            self._held[path] = size
            self._bytes += size

    def _write_all(self) -> None:
        while (task := self._tasks.get()) is not None:
            try:
                self._write(*task)
            except OSError as error:
                self.dropped += 1
                LOG.warning("prefix cache: %s cannot be written: %s", self._path(task[0]), error)

    def _write(self, name: bytes, content: torch.Tensor) -> None:
        path = self._path(name)
        if name in self:
            return
        path.parent.mkdir(exist_ok=True)
        partial = path.with_name(f"{path.name}.{os.getpid()}{PARTIAL}")
        body = content.numpy()
        try:
            with partial.open("wb") as file:
                file.write(_HEAD.pack(MAGIC, VERSION, len(body), name, _checksum(content)))
                file.write(body.data)
            partial.replace(path)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise
        with self._lock:
            self._held[path] = len(body) + _HEAD.size
            self._bytes += self._held[path]
        self._prune()

    def _prune(self) -> None:
        while True:
            with self._lock:
                if self._bytes <= self.limit or not self._held:
                    return
                path, size = self._held.popitem(last=False)
                self._bytes -= size
            path.unlink(missing_ok=True)

    def _forget(self, path: Path) -> None:
        with self._lock:
            self._bytes -= self._held.pop(path, 0)


def _fits(head: bytes, name: bytes, content: torch.Tensor) -> bool:
    if len(head) != _HEAD.size:
        return False
    magic, version, size, held, checksum = _HEAD.unpack(head)
    known = (magic, version, size, held) == (MAGIC, VERSION, content.numel(), name)
    return known and checksum == _checksum(content)


def _checksum(content: torch.Tensor) -> bytes:
    return hashlib.blake2b(content.numpy().data, digest_size=16).digest()
