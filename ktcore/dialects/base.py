"""What every way of writing calls has in common: a call, and a format that reads and forces it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Call:
    """A call of a tool.

    Attributes:
        arguments: a JSON object as text.
        id: the model's own name for the call, if it gives one.
    """

    name: str
    arguments: str
    id: str = ""


Read = Callable[[str, Mapping[str, Any]], "tuple[list[Call], int] | None"]
"""(text from the format's first mark on, tools by name) -> calls and how many characters they take; None: none yet."""


@dataclass(frozen=True)
class ToolFormat:
    """Attributes:
    marks: each begins a call, or several.
    ends: spellings between and after calls that are no text of the answer.
    read: reads the first call.
    forced: how a call must begin, go on and end: text around `{name}` and `{arguments}`.
    section: what stands before the first call and after the last one.
    joint: what stands between two calls; None: a forced answer has one call.
    bare: an answer that begins with a brace is a call too.
    series: and so is a brace behind a call.
    """

    name: str
    marks: tuple[str, ...]
    ends: tuple[str, ...]
    read: Read
    forced: str
    section: tuple[str, str] = ("", "")
    joint: str | None = None
    bare: bool = False
    series: bool = False

    @property
    def spellings(self) -> tuple[str, ...]:
        """All that is written around calls."""
        return self.marks + self.ends
