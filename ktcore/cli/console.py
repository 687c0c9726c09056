"""What commands print: answers on stdout, everything about them on stderr."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

    from ktcore.engine.model import Model, Stats


def err_console() -> Console:
    """A rich console on stderr."""
    from rich.console import Console

    return Console(stderr=True, highlight=False)


def out_console() -> Console:
    """A rich console on stdout."""
    from rich.console import Console

    return Console(highlight=False)


def print_json(value: Any) -> None:
    """One JSON object on stdout."""
    sys.stdout.write(json.dumps(value, indent=2) + "\n")


def write(text: str) -> None:
    """Text to stdout at once, as it comes from a model."""
    sys.stdout.write(text)
    sys.stdout.flush()


def speed(stats: Stats) -> str:
    """Prefill and decode speed in a line."""
    return (
        f"prefill {stats.prompt_tokens} tokens at {stats.prefill_tok_s:.0f} tok/s, "
        f"decode {stats.new_tokens} tokens at {stats.decode_tok_s:.0f} tok/s"
    )


@contextmanager
def loaded(path: Path, **options: Any) -> Iterator[Model]:
    """A loaded model, with a progress bar on the terminal while it loads."""
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn

    from ktcore.engine.model import load

    console = err_console()
    with Progress(
        TextColumn("loading"),
        BarColumn(),
        DownloadColumn(binary_units=True),
        TextColumn("{task.description}"),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    ) as bar:
        task = bar.add_task("", total=None)
        model = load(
            path,
            progress=lambda name, done, total: bar.update(task, description=name, completed=done, total=total),
            **options,
        )
    with model:
        if model.plan.fallbacks:
            console.print(_fallbacks(model), style="yellow")
        yield model


def _fallbacks(model: Model) -> str:
    kinds = sorted({f"{c.implementation.id} ({c.rejected[0].reason})" for c in model.plan.fallbacks})
    return f"note: {len(model.plan.fallbacks)} nodes run on fallbacks: {'; '.join(kinds)}; see `ktcore plan`"
