"""The `ktcore` program: runs a command, and turns errors that a user can meet into one line and an exit code."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ktcore.errors import KtcoreError

INTERRUPTED = 130


def main(args: Sequence[str] | None = None) -> None:
    """Run the program and leave with its exit code: 0, 1 for an error, 2 for wrong usage, 130 for Ctrl-C.

    Args:
        args: the words after `ktcore`; None takes the process's own.
    """
    # nothing but the standard library is imported above: Ctrl-C before this line is Python's own affair
    with _interrupted_imports_end_all():
        try:
            _run(args)
        except KeyboardInterrupt:
            raise SystemExit(INTERRUPTED) from None


def _run(args: Sequence[str] | None) -> None:
    import typer

    from ktcore.cli.app import build_app
    from ktcore.cli.options import State
    from ktcore.errors import KtcoreError

    _tolerant_streams()
    state = State()
    try:
        typer.main.get_command(build_app())(args=args, prog_name="ktcore", obj=state)
    except Exception as error:
        known = error if isinstance(error, KtcoreError) else _out_of_memory(error)
        if known is None or state.debug:
            raise
        from ktcore.cli.terminal import show_error

        show_error(known)
        raise SystemExit(1) from None


@contextmanager
def _interrupted_imports_end_all() -> Iterator[None]:
    """Ctrl-C within an import ends the process at once: what is half imported often cannot be imported again."""
    mine = sys._getframe(2)

    def handler(number: int, frame: FrameType | None) -> None:
        while frame is not None and frame is not mine:
            if frame.f_code.co_filename.startswith("<frozen importlib"):
                os._exit(INTERRUPTED)
            frame = frame.f_back
        raise KeyboardInterrupt

    # where the caller has a handler of its own, or has Ctrl-C ignored, it stays so
    if (
        threading.current_thread() is not threading.main_thread()
        or signal.getsignal(signal.SIGINT) is not signal.default_int_handler
    ):
        yield
        return
    signal.signal(signal.SIGINT, handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _out_of_memory(error: Exception) -> KtcoreError | None:
    """What allocators raise in kinds of their own, as an error for users; None when it is something else."""
    from ktcore.errors import KtcoreError

    text = str(error).splitlines()[0] if str(error) else "no more memory"
    if isinstance(error, MemoryError) or "allocate memory" in text or "out of memory" in text.lower():
        return KtcoreError(f"out of memory: {text}", "`ktcore plan` tells what is needed; --context changes it most")
    return None


def _tolerant_streams() -> None:
    """A terminal that cannot show a character, or input that is not UTF-8, must not end an answer."""
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        reconfigure = getattr(stream, "reconfigure", None)
        if reconfigure is not None:
            reconfigure(errors="replace")


if __name__ == "__main__":
    main()
