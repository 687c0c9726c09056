"""What commands show besides their result: errors, notes and progress on stderr, tables and JSON on stdout."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

    from ktcore.engine.model import Model
    from ktcore.errors import KtcoreError

RENDERING = "transformers.utils.chat_template_utils"
"""What renders chat templates; its import takes as long as loading a small model."""
WIDE = 160
"""Columns of a table that goes into a file or a pipe, where nothing tells the width."""


def console(stderr: bool = False) -> Console:
    """A console that leaves numbers and brackets as they are."""
    from rich.console import Console

    made = Console(stderr=stderr, highlight=False, soft_wrap=stderr)
    if not made.is_terminal and "COLUMNS" not in made._environ:
        made.width = WIDE
    return made


def show_error(error: KtcoreError) -> None:
    """One red line that says what is wrong, and one that says what to do."""
    from rich.markup import escape

    err = console(stderr=True)
    err.print(f"[bold red]error:[/] {escape(error.message)}")
    if error.hint:
        err.print(f"  [dim]hint:[/] {escape(error.hint)}")


def note(text: str) -> None:
    """A dim line on stderr."""
    console(stderr=True).print(text, style="dim", markup=False)


def write(text: str) -> None:
    """A piece of a result, shown at once."""
    sys.stdout.write(text)
    sys.stdout.flush()


def write_json(value: Any) -> None:
    """One JSON object."""
    write(json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def fetched(module: str) -> None:
    """Import a module beside what is done next: reading weights leaves Python idle. Whoever needs it waits for it."""
    from importlib import import_module
    from threading import Thread

    def run() -> None:
        # what is wrong with it is said where it is needed
        with suppress(Exception):
            import_module(module)

    Thread(target=run, name=f"import {module}").start()


@contextmanager
def opened(path: Path, **options: Any) -> Iterator[tuple[Model, float]]:
    """A loaded model and the seconds that loading took, with a progress bar when stderr is a terminal.

    Args:
        options: of `ktcore.load`.
    """
    with loading_bar(f"loading {path.name}") as progress:
        model, took = _load(path, {**options, "progress": progress})
    if errors := model.quantization_error:
        note("quantised while loading, relative error: " + ", ".join(f"{op} {e:.2%}" for op, e in errors.items()))
    with model:
        yield model, took


def _load(path: Path, options: dict[str, Any]) -> tuple[Model, float]:
    """The model, and the seconds without the import of torch, which are Python's and not the model's."""
    from ktcore.engine.model import load

    began = time.perf_counter()
    model = load(path, **options)
    return model, time.perf_counter() - began


@contextmanager
def loading_bar(text: str) -> Iterator[Callable[[str, int, int], None] | None]:
    """What shows (node, bytes done, bytes in all) as a bar on stderr; None when that is no terminal."""
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn

    err = console(stderr=True)
    if not err.is_terminal:
        yield None
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(binary_units=True),
        TextColumn("{task.fields[node]}"),
    )
    with Progress(*columns, console=err, transient=True) as progress:
        task = progress.add_task(text, total=None, node="")

        def loaded(node: str, done: int, total: int) -> None:
            progress.update(task, completed=done, total=total, node=node)

        yield loaded
