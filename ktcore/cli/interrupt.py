"""Ctrl-C that stops an answer between two tokens, where the engine is at rest, and not the program."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType


@dataclass
class Interrupted:
    """Whether Ctrl-C was pressed; true in a condition once it was."""

    pressed: bool = False

    def __bool__(self) -> bool:
        return self.pressed


@contextmanager
def noticing_interrupts() -> Iterator[Interrupted]:
    """Within the context the first Ctrl-C only sets the flag; the second raises KeyboardInterrupt at once."""
    noticed = Interrupted()

    def handler(number: int, frame: FrameType | None) -> None:
        if noticed.pressed:
            raise KeyboardInterrupt
        noticed.pressed = True

    before = signal.signal(signal.SIGINT, handler)
    try:
        yield noticed
    finally:
        signal.signal(signal.SIGINT, before)
