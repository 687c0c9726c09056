"""Reads gpt-oss' answers: messages in channels, of which one is the answer proper, and calls addressed to functions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ktcore.dialects.base import Call, More, ToolFormat
from ktcore.dialects.reading import follow, json_object, space, tagged, title, word
from ktcore.dialects.thoughts import first_of, held_back

CHANNEL = "<|channel|>"
FINAL = "<|channel|>final<|message|>"
"""What opens the answer proper."""
_START, _MESSAGE, _CONSTRAIN = "<|start|>", "<|message|>", "<|constrain|>"
_ENDS = ("<|end|>", "<|call|>", "<|return|>")
_MARKS = (CHANNEL, _START, *_ENDS)
_FUNCTIONS = "functions."

HARMONY = ToolFormat(
    "harmony",
    (),
    (),
    tagged(""),
    "<|channel|>commentary to=functions.{name} <|constrain|>json<|message|>{arguments}",
)


@dataclass(frozen=True)
class _Message:
    """What a message is: its channel, and the function that it calls, if it calls one."""

    channel: str = "final"
    function: str = ""


class Harmony:
    """Takes text as it comes and gives (content, reasoning, calls).

    A mark that belongs to no message's header or end is text like any other, and is told as soon as that is certain.

    Args:
        separate: the analysis channel is told as reasoning, not left out of nothing.
        tools: calls are told as such.
    """

    def __init__(self, separate: bool, tools: bool) -> None:
        self._separate = separate
        self._tools = tools
        self._held = ""
        # the prompt has opened the first message: the rest of its header may stand there
        self._opened = True
        self._message = _Message()
        self._arguments = ""
        self._content = ""
        self._reasoning = ""
        self._calls: list[Call] = []

    def push(self, text: str) -> tuple[str, str, tuple[Call, ...]]:
        """What is certain after this piece."""
        self._held += text
        while self._goes_on(False):
            pass
        return self._told()

    def flush(self) -> tuple[str, str, tuple[Call, ...]]:
        """What is left at the end; the token that ends a call ends the answer, and is not in its text."""
        while self._goes_on(True):
            pass
        self._end()
        return self._told()

    def _told(self) -> tuple[str, str, tuple[Call, ...]]:
        told = self._content, self._reasoning, tuple(self._calls)
        self._content, self._reasoning, self._calls = "", "", []
        return told

    def _goes_on(self, last: bool) -> bool:
        """One step further in what is held: whether another one can be taken."""
        if self._opened:
            found = _header(self._held, 0, True)
            if found == More() and not last:
                return False
            self._opened = False
            if isinstance(found, tuple):
                self._begin(*found)
            elif found == More() and CHANNEL in self._held:  # cut off within its header
                self._held = ""
            return True
        at = first_of(self._held, _MARKS)
        if at < 0:
            self._say(len(self._held) - (0 if last else held_back(self._held, _MARKS)))
            return False
        self._say(at)
        return self._mark(next(mark for mark in _MARKS if self._held.startswith(mark)), last)

    def _mark(self, mark: str, last: bool) -> bool:
        """One step further, at a mark."""
        ends = mark in _ENDS
        found = _header(self._held, space(self._held, len(mark), {}) if ends else 0)
        if isinstance(found, tuple):
            self._begin(*found)
        elif found == More():
            if not last:
                return False
            if ends:  # the answer's end, or cut off within the next message's header
                self._held = ""
            self._say(len(self._held))
        elif ends and self._message.function and _is_object(self._arguments):
            self._end()
            self._held = self._held[len(mark) :]
        else:
            self._say(len(mark))
        return bool(self._held)

    def _say(self, size: int) -> None:
        """So much of what is held is the message's text."""
        text, self._held = self._held[:size], self._held[size:]
        if self._message.function:
            self._arguments += text
        elif self._message.channel == "analysis" and self._separate:
            self._reasoning += text
        else:
            self._content += text

    def _begin(self, size: int, named: Mapping[str, str]) -> None:
        """A message begins behind a header of this size."""
        self._end()
        to = named.get("to", "")
        calls = self._tools and to.startswith(_FUNCTIONS)
        self._message = _Message(named.get("channel", ""), to.removeprefix(_FUNCTIONS) if calls else "")
        self._held = self._held[size:]

    def _end(self) -> None:
        """A message ends; what follows without a header is part of the answer proper."""
        if self._message.function:
            self._calls.append(Call(self._message.function, self._arguments.strip() or "{}"))
        self._message, self._arguments = _Message(), ""


def _header(text: str, at: int, opened: bool = False) -> tuple[int, dict[str, str]] | More | None:
    """A message's header: where it ends, its channel, and whom it is for.

    Args:
        opened: it may begin behind the start and the role.
    """
    start = follow((word(_START), space, title("[a-z]+", "role")), text[at:])
    if isinstance(start, tuple):
        at += start[0]
    elif not text.startswith(CHANNEL, at) and not opened:
        return More() if CHANNEL.startswith(text[at:]) else start
    found = follow((space, _recipient, space, _channel, space, _recipient, space, *_KIND), text[at:])
    if not isinstance(found, tuple):
        return found
    size, named = found
    addressed = isinstance(start, tuple) or "channel" in named or "to" in named
    return (at + size, named) if addressed else None


def _channel(text: str, at: int, named: dict[str, str]) -> int | More | None:
    end = word(CHANNEL, optional=True)(text, at, named)
    if not isinstance(end, int) or end == at:
        return end
    at = space(text, end, named)
    end = word("analysis", "commentary", "final")(text, at, named)
    if isinstance(end, int):
        named["channel"] = text[at:end]
    return end


def _recipient(text: str, at: int, named: dict[str, str]) -> int | More | None:
    end = word("to=", optional=True)(text, at, named)
    return title(r"[\w.-]+", "to")(text, end, named) if isinstance(end, int) and end > at else end


def _kind(text: str, at: int, named: dict[str, str]) -> int | More | None:
    """The kind of what follows, such as `json`, which stands behind a mark or behind the channel."""
    if text.startswith(_MESSAGE, at):
        return at
    end = word(_CONSTRAIN, optional=True)(text, at, named)
    if not isinstance(end, int) or (end == at and "channel" not in named):
        return end
    return title("[a-z]+", "kind", optional=True)(text, space(text, end, named), named)


_KIND = (_kind, space, word(_MESSAGE))


def _is_object(text: str) -> bool:
    found = json_object(text, 0)
    return isinstance(found, tuple) and not text[found[1] :].strip()
