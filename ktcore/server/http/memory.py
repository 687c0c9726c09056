"""Keeps the memory of a long-running server flat: free pages go back to the system, garbage is found soon.

Answers leave tensors of many sizes between those that stay, in one arena of the C library a thread. It returns only
what is free at an arena's end by itself, so that the holes add up for hours; and Python looks for cycles among old
objects only when there are a quarter more of them, of which a server has many since its start.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import gc
import sys
from collections.abc import AsyncIterator

EVERY = 10.0
"""Seconds between two times that free memory is given back."""


def trim() -> bool:
    """Give free pages of all arenas back to the system; False where the C library has no `malloc_trim` (not glibc)."""
    if not sys.platform.startswith("linux"):
        return False
    release = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if release is None:
        return False
    release(ctypes.c_size_t(0))
    return True


def freeze() -> None:
    """Leave what is there now out of the search for garbage: a full one is quick then, and comes often enough.

    For the whole process, so it is a command's to call, when everything that stays is loaded.
    """
    gc.collect()
    gc.freeze()
    gc.collect()


@contextlib.asynccontextmanager
async def trimming(every: float = EVERY) -> AsyncIterator[None]:
    """Within the context memory is given back every so many seconds, by a thread beside the event loop."""

    async def run() -> None:
        while await asyncio.to_thread(trim):
            await asyncio.sleep(every)

    task = asyncio.create_task(run())
    try:
        yield
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
