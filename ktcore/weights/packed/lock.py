"""One writer at a time to a packed folder, over processes; a killed one leaves nothing locked."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from ktcore.errors import CheckpointError
from ktcore.weights.packed.container import write_error


@contextmanager
def write_lock(path: Path, waiting: Callable[[], None] | None = None) -> Iterator[None]:
    """Hold the lock file `path`.

    Args:
        waiting: called once when another process holds it, and then it is waited for; None makes that an error.

    Raises:
        CheckpointError: another process holds it, or the file cannot be made.
    """
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise write_error(path, error) from error
    try:
        _take(descriptor, path, waiting)
        yield
    finally:
        os.close(descriptor)


def _take(descriptor: int, path: Path, waiting: Callable[[], None] | None) -> None:
    try:
        import fcntl
    except ImportError:  # a system without it: the last one to finish wins
        return
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        if waiting is None:
            raise CheckpointError(
                f"{path}: another process is writing there", "wait for it, or give another place"
            ) from None
        waiting()
        fcntl.flock(descriptor, fcntl.LOCK_EX)
    except OSError as error:
        raise write_error(path, error) from error
