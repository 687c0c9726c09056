"""Separates what a reasoning model thinks from what it answers, as the text streams."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

Begins = Callable[[str], "bool | None"]
"""(text from a call's mark on) -> whether a call stands there; None: not yet known."""

# Marks of thoughts that templates are known to write, or to look for in what the model said.
_MARKS = (
    *(("<think>", "</think>"), ("[THINK]", "[/THINK]"), ("<seed:think>", "</seed:think>")),
    *(("<|START_THINKING|>", "<|END_THINKING|>"), ("<mm:think>", "</mm:think>")),
)


@dataclass(frozen=True)
class ThoughtMarks:
    """What stands around a model's thoughts."""

    begin: str
    end: str

    def begun(self, prompt_end: str) -> bool:
        """Whether the prompt has opened the thoughts already."""
        return prompt_end.rstrip().endswith(self.begin)


def marks_in(template: str) -> ThoughtMarks | None:
    """The marks that a chat template speaks of, if it does."""
    found = next((pair for pair in _MARKS if pair[1] in template), None)
    return None if found is None else ThoughtMarks(*found)


class Thoughts:
    """Takes text as it comes and gives (thoughts, answer); white space around the marks belongs to neither.

    Args:
        begun: the prompt ends inside of the thoughts.
        call_marks: of calls that end open thoughts.
        begins: whether one is begun by its mark, or merely spoken of.
    """

    def __init__(
        self,
        marks: ThoughtMarks,
        begun: bool,
        call_marks: tuple[str, ...] = (),
        begins: Begins = lambda text: False,
    ) -> None:
        self._call_marks = call_marks
        self._begins = begins
        # the part of `_held` in which no call begins
        self._seen = 0
        self._marks = marks
        self._held = ""
        self._thinking = begun
        self._settled = begun
        # no mark has been before: what an answer without thoughts begins with is its own
        self._at_start = begun

    def push(self, text: str) -> tuple[str, str]:
        """What is certain after this piece."""
        self._held += text
        if not self._settled:
            start = self._held.lstrip()
            if len(start) < len(self._marks.begin) and self._marks.begin.startswith(start):
                return "", ""
            self._settled = True
            if start.startswith(self._marks.begin):
                self._thinking = self._at_start = True
                self._held = start[len(self._marks.begin) :]
        if not self._thinking:
            return "", self._said()
        return self._thought(False)

    def flush(self) -> tuple[str, str]:
        """What is left at the end: an answer cut off inside of its thoughts has nothing but them."""
        if self._thinking:
            return self._thought(True)
        rest, self._held = self._held, ""
        return "", rest

    def _thought(self, last: bool) -> tuple[str, str]:
        """More of the thoughts, and what follows them where they end: at their mark, or where a call begins."""
        at = self._held.find(self._marks.end)
        call, certain = self._call(self._held if at < 0 else self._held[:at], last or at >= 0)
        if certain:
            thought = self._trimmed(self._held[:call]).rstrip()
            self._held = self._held[call:]
            self._thinking, self._at_start = False, False
            return thought, self._said()
        if at >= 0:
            thought = self._trimmed(self._held[:at]).rstrip()
            self._held = self._held[at + len(self._marks.end) :]
            self._thinking, self._at_start = False, True
            return thought, self._said()
        if last:
            rest, self._held = self._held, ""
            return self._trimmed(rest), ""
        keep = held_back(self._held, (self._marks.end, *self._call_marks))
        body = self._held[: len(self._held) - keep if call < 0 else call].rstrip()
        self._held = self._held[len(body) :]
        self._seen = max(self._seen - len(body), 0)
        return self._trimmed(body), ""

    def _call(self, text: str, last: bool) -> tuple[int, bool]:
        """Where a call may begin, and whether it is certain that one does; -1 where none can."""
        while True:
            at = first_of(text[self._seen :], self._call_marks)
            if at < 0:
                return at, False
            at += self._seen
            begins = self._begins(text[at:])
            if begins is not None and begins:
                return at, True
            if begins is None and not last:
                return at, False
            self._seen = at + 1

    def _said(self) -> str:
        said, self._held = self._held, ""
        return self._trimmed(said)

    def _trimmed(self, text: str) -> str:
        """Without white space where thoughts or answer begin."""
        if not self._at_start:
            return text
        text = text.lstrip()
        self._at_start = not text
        return text


def held_back(text: str, marks: tuple[str, ...]) -> int:
    """Length of the longest end of `text` that could become one of the marks."""
    longest = max(map(len, marks), default=0) - 1
    for size in range(min(longest, len(text)), 0, -1):
        if any(mark.startswith(text[-size:]) for mark in marks):
            return size
    return 0


def first_of(text: str, marks: tuple[str, ...]) -> int:
    """Where the first of the marks begins; -1 where none is."""
    found = re.search("|".join(map(re.escape, marks)), text) if marks else None
    return -1 if found is None else found.start()
