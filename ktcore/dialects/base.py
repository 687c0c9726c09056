"""What every way of writing calls has in common: a call, and a format that reads and forces it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Call:
    """A call of a tool.

    Attributes:
        arguments: a JSON object as text, unless the model wrote none.
        id: the model's own name for the call, if it gives one.
    """

    name: str
    arguments: str
    id: str = ""


@dataclass(frozen=True)
class Found:
    """Calls at the beginning of a text.

    Attributes:
        size: characters that they take.
        text: what stood among them and is no call.
    """

    calls: tuple[Call, ...]
    size: int
    text: str = ""


@dataclass(frozen=True)
class More:
    """What a text begins with may yet become a call.

    Attributes:
        until: characters of which one must come before anything is decided; empty: any may.
    """

    until: str = ""


Seen = Found | More | None
"""None: the text does not begin with a call, whatever may follow."""
Read = Callable[[str, Mapping[str, Any]], Seen]
"""(text from a call's mark on, tools' schemas by name) -> what it begins with."""


@dataclass(frozen=True)
class Pairs:
    """How arguments are written one by one, as text: `{opens}key{named}{begins}value{closes}`.

    Attributes:
        gap: what a model writes between `named` and `begins`.
        after: what it writes behind `closes`.
        lines: a newline on each side of a value is the format's, not the value's.
        typed: the model itself says in an attribute, `string="true"`, whether a value is a string.
    """

    opens: str
    named: str
    begins: str
    closes: str
    gap: str = ""
    after: str = "\n"
    lines: bool = False
    typed: bool = False


@dataclass(frozen=True)
class ToolFormat:
    """Attributes:
    marks: each begins a call, or several.
    ends: spellings between and after calls that are no text of the answer.
    read: reads the first call.
    forced: how a call must begin, go on and end: text around `{name}` and `{arguments}` or `{pairs}`.
    section: what stands before the first call and after the last one.
    joint: what stands between two calls; None: a forced answer has one call.
    bare: an answer that begins with a brace is a call too.
    series: and so is a brace behind a call.
    pairs: how arguments are written where they come one by one.
    ends_thoughts: models are known to begin calls without closing their thoughts: a call ends them.
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
    pairs: Pairs | None = None
    ends_thoughts: bool = False

    @property
    def spellings(self) -> tuple[str, ...]:
        """All that is written around calls."""
        return self.marks + self.ends
