"""Maps the pages of packed weights before they are used: from a thread of its own, in the order of use."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import sys
from collections import deque
from collections.abc import Callable
from threading import Lock, Thread, get_native_id
from weakref import ref

import numpy as np

CHUNK = 16 << 20
"""Bytes mapped at once: while the system does so, who wants new memory from it waits."""
_POPULATE_READ = 22
_NICE = 19
"""What the first tokens are computed by goes first: pages that are in memory already cost them little."""


class Populate:
    """Maps what it is given, one after the other; whoever needs a page before that waits for this page alone.

    It keeps nothing alive: a map that nobody else holds any more is left out.
    """

    def __init__(self) -> None:
        self._waiting: deque[ref[mmap.mmap]] = deque()
        self._lock = Lock()
        self._thread: Thread | None = None

    def add(self, mapped: mmap.mmap) -> None:
        """Have a read-only map's pages mapped, behind those that were given before; returns at once."""
        with self._lock:
            self._waiting.append(ref(mapped))
            if self._thread is None:
                self._thread = Thread(target=self._run, name="ktcore-populate", daemon=True)
                self._thread.start()

    def wait(self) -> None:
        """Until everything given so far is mapped."""
        thread = self._thread
        if thread is not None:
            thread.join()

    def _run(self) -> None:
        if sys.platform == "linux":  # elsewhere a thread has no priority of its own
            os.setpriority(os.PRIO_PROCESS, get_native_id(), _NICE)
        while True:
            with self._lock:
                if not self._waiting:
                    self._thread = None
                    return
                mapped = self._waiting.popleft()
            at = 0
            while (held := mapped()) is not None and at < len(held):
                _populate(np.frombuffer(held, np.uint8)[at : at + CHUNK])
                at += CHUNK
                del held


def _populate(part: np.ndarray) -> None:
    """Map a range that begins with a page. By libc, since mmap.madvise holds the interpreter's lock."""
    if _madvise is not None:
        if _madvise(part.ctypes.data, part.nbytes, _POPULATE_READ) == 0:
            return
        if ctypes.get_errno() != errno.EINVAL:
            return  # a page that cannot be read is the affair of whoever needs it
    # an older kernel, or another system: a byte of each page
    np.add.reduce(part[:: mmap.PAGESIZE])


def _libc_madvise() -> Callable[[int, int, int], int] | None:
    if sys.platform != "linux":
        return None
    found = ctypes.CDLL(None, use_errno=True).madvise
    found.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    return found


_madvise = _libc_madvise()
