"""Reads calls of tools out of an answer's text as it streams; what is no call stays the text that it is."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ktcore.dialects.base import Call, Found, More, ToolFormat
from ktcore.dialects.thoughts import first_of, held_back


class Calls:
    """Takes text as it comes and gives (text, calls).

    A mark that begins no call, because something else follows it or the answer ends too early, is text, and is told as
    soon as that is certain; calls behind it still count.

    Args:
        tools: parameters' JSON schemas by the tools' names.
    """

    def __init__(self, made: ToolFormat, tools: Mapping[str, Any]) -> None:
        self._format = made
        self._tools = tools
        self._held = ""
        # what `_held` begins with, where a call may begin: white space, and the mark behind it
        self._space = self._mark = ""
        self._waits = More()
        self._inside = False
        self._begun = False
        self._after = False

    def push(self, text: str) -> tuple[str, list[Call]]:
        """What is certain after this piece."""
        self._held += text
        if self._inside and self._waits.until and not any(each in text for each in self._waits.until):
            return "", []
        return self._take(False)

    def flush(self) -> tuple[str, list[Call]]:
        """What is left at the end."""
        return self._take(True)

    def _take(self, last: bool) -> tuple[str, list[Call]]:
        said = ""
        calls: list[Call] = []
        while True:
            if not self._inside:
                said += self._outside(last)
            if not self._inside:
                return said, calls
            seen = self._format.read(self._held, self._tools)
            if isinstance(seen, More) and not last:
                self._waits = seen
                return said, calls
            self._inside = False
            if isinstance(seen, Found):
                calls += seen.calls
                said += self._space + seen.text if seen.text else ""
                self._held, self._after = self._held[seen.size :], True
            else:
                said += self._space + self._mark
                self._held = self._held[len(self._mark) :]

    def _outside(self, last: bool) -> str:
        """Text before the next call, which stays held."""
        if self._after:
            self._skip_ends()
            if last and not self._held:
                return ""
            if not last and any(word.startswith(self._held) for word in self._format.spellings):
                return ""
        start = self._held.lstrip()
        braced = self._format.series if self._after else self._format.bare and not self._begun
        if braced and not start and not last:
            return ""
        if braced and start.startswith("{"):
            self._enter(len(self._held) - len(start), self._held[: len(self._held) - len(start)], "{")
            return ""
        self._after = False
        at = first_of(self._held, self._format.marks)
        if at >= 0:
            said = self._held[:at].rstrip()
            mark = next(mark for mark in self._format.marks if self._held.startswith(mark, at))
            self._enter(at, self._held[len(said) : at], mark)
            return said
        if last:
            said, self._held = self._held, ""
            return said
        certain = self._held[: len(self._held) - held_back(self._held, self._format.marks)].rstrip()
        self._held = self._held[len(certain) :]
        self._begun |= bool(certain)
        return certain

    def _enter(self, at: int, space: str, mark: str) -> None:
        """A call may begin there; white space before it is the format's if one does."""
        self._space, self._mark, self._waits = space, mark, More()
        self._held = self._held[at:]
        self._inside = self._begun = True
        self._after = False

    def _skip_ends(self) -> None:
        """Leave out what the format writes between and after its calls."""
        while True:
            self._held = self._held.lstrip()
            end = next((end for end in self._format.ends if self._held.startswith(end)), None)
            if end is None:
                return
            self._held = self._held[len(end) :]
