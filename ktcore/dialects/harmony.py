"""Reads gpt-oss' answers: messages in channels, of which one is the answer proper, and calls addressed to functions."""

from __future__ import annotations

import re

from ktcore.dialects.base import Call, ToolFormat
from ktcore.dialects.reading import tagged
from ktcore.dialects.thoughts import held_back

CHANNEL = "<|channel|>"
FINAL = "<|channel|>final<|message|>"
"""What opens the answer proper."""
_MARKS = (CHANNEL, "<|message|>", "<|start|>", "<|end|>", "<|constrain|>", "<|call|>", "<|return|>")
_TO = re.compile(r"to=functions\.([\w.-]+)")

HARMONY = ToolFormat(
    "harmony",
    (),
    (),
    tagged(""),
    "<|channel|>commentary to=functions.{name} <|constrain|>json<|message|>{arguments}",
)


class Harmony:
    """Takes text as it comes and gives (content, reasoning, calls).

    Args:
        separate: the analysis channel is told as reasoning, not left out of nothing.
        tools: calls are told as such.
    """

    def __init__(self, separate: bool, tools: bool) -> None:
        self._separate = separate
        self._tools = tools
        self._held = ""
        self._header: str | None = None
        # before the first mark a recipient may stand: the prompt has opened the message already
        self._lead: str | None = ""
        self._name = ""
        self._arguments = ""

    def push(self, text: str) -> tuple[str, str, tuple[Call, ...]]:
        """What is certain after this piece."""
        return self._take(text, False)

    def flush(self) -> tuple[str, str, tuple[Call, ...]]:
        """What is left at the end; the token that ends a call ends the answer, and is not in its text."""
        content, reasoning, calls = self._take("", True)
        content += self._lead or ""
        return content, reasoning, (*calls, *self._ended())

    def _take(self, text: str, last: bool) -> tuple[str, str, tuple[Call, ...]]:
        self._held += text
        content: list[str] = []
        reasoning: list[str] = []
        calls: list[Call] = []
        while True:
            found = re.search("|".join(map(re.escape, _MARKS)), self._held)
            size = found.start() if found else len(self._held) - (0 if last else held_back(self._held, _MARKS))
            body, self._held = self._held[:size], self._held[size:]
            self._body(body, content, reasoning)
            if found is None:
                return "".join(content), "".join(reasoning), tuple(calls)
            self._held = self._held[len(found[0]) :]
            calls += self._mark(found[0])

    def _body(self, text: str, content: list[str], reasoning: list[str]) -> None:
        if self._lead is not None:
            self._lead += text
            if self._lead.lstrip()[:3] == "to="[: len(self._lead.lstrip())]:
                return
            text, self._lead = self._lead, None
        if self._header is not None:
            self._header += text
        elif self._name:
            self._arguments += text
        elif self._channel == "analysis" and self._separate:
            reasoning.append(text)
        else:
            content.append(text)

    _channel = ""

    def _mark(self, mark: str) -> list[Call]:
        if self._lead is not None:
            self._header, self._lead = self._lead, None
        if mark == "<|message|>":
            header, self._header = self._header or "", None
            self._channel = "analysis" if "analysis" in header else "final"
            to = _TO.search(header)
            self._name, self._arguments = (to[1] if to and self._tools else ""), ""
            return []
        if mark in (CHANNEL, "<|start|>", "<|constrain|>"):
            self._header = (self._header or "") + " "
            return []
        return self._ended()

    def _ended(self) -> list[Call]:
        name, self._name = self._name, ""
        return [Call(name, self._arguments.strip() or "{}")] if name else []
