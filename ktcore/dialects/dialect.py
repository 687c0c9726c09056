"""What a model's chat template tells about its answers: marks of thoughts, and the format of calls."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from ktcore.dialects.base import Call, Found, More, ToolFormat
from ktcore.dialects.calls import Calls
from ktcore.dialects.harmony import CHANNEL, HARMONY, Harmony
from ktcore.dialects.known import format_in
from ktcore.dialects.thoughts import ThoughtMarks, Thoughts, marks_in
from ktcore.text.guides import Thought
from ktcore.text.tokenizer import Tokenizer

# Marks inside of calls: those of DeepSeek, Kimi, Mistral and GLM.
_INNER = (
    *("<｜tool▁sep｜>", "<|tool_call_argument_begin|>", "[ARGS]", "[CALL_ID]"),
    *("<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>"),
)
# Enough of a prompt's end to see whether it has opened the thoughts.
_TAIL = 16


@dataclass(frozen=True)
class Part:
    """A piece of an answer, taken apart."""

    content: str = ""
    reasoning: str = ""
    calls: tuple[Call, ...] = ()


@dataclass(frozen=True)
class Dialect:
    """Attributes:
    thoughts: marks around thoughts; None where the model marks none.
    tools: how calls are written; None where the template knows no tools.
    harmony: answers come in gpt-oss' channels.
    """

    thoughts: ThoughtMarks | None = None
    tools: ToolFormat | None = None
    harmony: bool = False

    @property
    def thinks(self) -> bool:
        """Whether thoughts are told apart from answers."""
        return self.thoughts is not None or self.harmony

    def shown(self, tokenizer: Tokenizer) -> frozenset[int]:
        """Control tokens that must be seen, or thoughts and calls could not be found."""
        words = (() if self.tools is None else self.tools.spellings) + (
            () if self.thoughts is None else (self.thoughts.begin, self.thoughts.end)
        )
        found = (tokenizer.token_id(word) for word in (*words, *_INNER))
        return frozenset(i for i in found if i is not None and tokenizer.is_control(i))


def dialect_of(template: str | None) -> Dialect:
    """The dialect of a chat template's source."""
    source = template or ""
    if CHANNEL in source:
        return Dialect(None, HARMONY, harmony=True)
    return Dialect(marks_in(source), format_in(source))


class Reader:
    """Takes an answer's text as it comes, and takes it apart.

    Args:
        prompt: its ids: they tell whether the thoughts have begun.
        separate: thoughts are kept apart from the content.
        tools: schemas of the tools that the request offers, by name; none: calls are text like any other.
        several: tell all calls; otherwise the first one alone.
    """

    def __init__(
        self,
        dialect: Dialect,
        tokenizer: Tokenizer,
        prompt: list[int],
        separate: bool,
        tools: Mapping[str, Any],
        several: bool = True,
    ) -> None:
        self._left: int | None = None if several else 1
        self._harmony = Harmony(separate, bool(tools)) if dialect.harmony else None
        self._thoughts = None
        if separate and dialect.thoughts is not None:
            tail = tokenizer.decode(prompt[-_TAIL:], skip_special=False)
            ending = dialect.tools if tools and dialect.tools is not None and dialect.tools.ends_thoughts else None
            begun = dialect.thoughts.begun(tail)
            self._thoughts = (
                Thoughts(dialect.thoughts, begun)
                if ending is None
                else Thoughts(dialect.thoughts, begun, ending.marks, partial(_calls_one, ending, tools))
            )
        self._calls = Calls(dialect.tools, tools) if tools and dialect.tools is not None else None

    def push(self, text: str) -> Part:
        """What is certain after this piece."""
        return self._limited(self._pushed(text))

    def end(self) -> Part:
        """What is left when the answer has ended."""
        return self._limited(self._ended())

    def _limited(self, part: Part) -> Part:
        if self._left is None or not part.calls:
            return part
        kept = part.calls[: self._left]
        self._left -= len(kept)
        return Part(part.content, part.reasoning, kept)

    def _pushed(self, text: str) -> Part:
        if self._harmony is not None:
            return Part(*self._harmony.push(text))
        reasoning, said = ("", text) if self._thoughts is None else self._thoughts.push(text)
        if self._calls is None:
            return Part(said, reasoning)
        content, calls = self._calls.push(said)
        return Part(content, reasoning, tuple(calls))

    def _ended(self) -> Part:
        if self._harmony is not None:
            return Part(*self._harmony.flush())
        reasoning, said = ("", "") if self._thoughts is None else self._thoughts.flush()
        if self._calls is None:
            return Part(said, reasoning)
        content, calls = self._calls.push(said)
        rest, late = self._calls.flush()
        return Part(content + rest, reasoning, (*calls, *late))


def _calls_one(made: ToolFormat, tools: Mapping[str, Any], text: str) -> bool | None:
    """Whether a text begins with a call of a tool that is offered: thoughts may speak of other calls."""
    seen = made.read(text, tools)
    if isinstance(seen, Found):
        return any(call.name in tools for call in seen.calls)
    return None if isinstance(seen, More) else False


def thought_before(dialect: Dialect, tokenizer: Tokenizer, prompt: list[int]) -> Thought | None:
    """The thoughts that a form must leave room for."""
    if dialect.harmony:
        return Thought("<|channel|>analysis<|message|>", "<|end|><|start|>assistant", False)
    marks = dialect.thoughts
    if marks is None:
        return None
    tail = tokenizer.decode(prompt[-_TAIL:], skip_special=False)
    closed = tail.rstrip().endswith(marks.end)
    return None if closed else Thought(marks.begin, marks.end, marks.begun(tail))
