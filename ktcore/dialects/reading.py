"""Readers that several ways of writing calls share: what stands before arguments, and JSON objects, alone or listed."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ktcore.dialects.base import Call, Found, More, Read, Seen

Step = Callable[[str, int, dict[str, str]], "int | More | None"]
"""(text, where, what was named so far) -> where it ends; More: the text ends first; None: something else is there."""


def word(*spellings: str, optional: bool = False) -> Step:
    """One of the spellings."""

    def step(text: str, at: int, named: dict[str, str]) -> int | More | None:
        found = next((each for each in spellings if text.startswith(each, at)), None)
        if found is not None:
            return at + len(found)
        if any(each.startswith(text[at:]) for each in spellings):
            return More()
        return at if optional else None

    return step


def title(pattern: str, key: str = "name", optional: bool = False) -> Step:
    """As many characters as an expression matches, kept under a key; it must match whatever it has matched so far."""
    expression = re.compile(pattern)

    def step(text: str, at: int, named: dict[str, str]) -> int | More | None:
        found = expression.match(text, at)
        if (found.end() if found else at) == len(text):
            return More()
        if found is None:
            return at if optional else None
        named[key] = found[0]
        return found.end()

    return step


def space(text: str, at: int, named: dict[str, str]) -> int:
    """White space, or none."""
    while at < len(text) and text[at].isspace():
        at += 1
    return at


def follow(steps: Sequence[Step], text: str) -> tuple[int, dict[str, str]] | More | None:
    """All steps, one after the other: where they end, and what was named."""
    at, named = 0, dict[str, str]()
    for step in steps:
        end = step(text, at, named)
        if not isinstance(end, int):
            return end
        at = end
    return at, named


def tagged(mark: str, key: str = "arguments") -> Read:
    """An object that names its tool, behind a mark; where none stands, its tool must be one that is offered."""

    def read(text: str, tools: Mapping[str, Any]) -> Seen:
        behind = bool(mark) and text.startswith(mark)
        found = json_object(text, len(mark) if behind else 0)
        if not isinstance(found, tuple):
            return found
        call = named_json(found[0], key)
        if call is None or not (behind or call.name in tools):
            return None
        return Found((call,), found[1])

    return read


def matching(*steps: Step, named: Callable[[dict[str, str]], tuple[str, str] | None] | None = None) -> Read:
    """Steps that name the tool, and a JSON object.

    Args:
        named: the tool's name and the call's id, of what the steps have named.
    """

    def read(text: str, tools: Mapping[str, Any]) -> Seen:
        head = follow(steps, text)
        if not isinstance(head, tuple):
            return head
        at, words = head
        who = (words["name"], words.get("id", "")) if named is None else named(words)
        found = json_object(text, at)
        if who is None:
            return None
        if not isinstance(found, tuple):
            return found
        return Found((Call(who[0], text[at : found[1]].strip(), who[1]),), found[1])

    return read


def listed(mark: str) -> Read:
    """A list of objects, or one after the other, behind a mark."""
    one = tagged(mark)

    def read(text: str, tools: Mapping[str, Any]) -> Seen:
        at = space(text, len(mark) if text.startswith(mark) else 0, {})
        if at == len(text):
            return More()
        if text[at] != "[" or not text.startswith(mark):
            return one(text, tools)
        calls: list[Call] = []
        odd = ""
        at += 1
        while True:
            at = space(text, at, {})
            if at < len(text) and text[at] == "]":
                return Found(tuple(calls), at + 1, odd) if calls else None
            if at < len(text) and text[at] == ",":
                at += 1
                continue
            found = json_object(text, at)
            if not isinstance(found, tuple):
                return found
            call = named_json(found[0])
            if call is None:
                odd += text[at : found[1]]
            else:
                calls.append(call)
            at = found[1]

    return read


def named_json(value: Mapping[str, Any], key: str = "arguments") -> Call | None:
    """The call that {"name": …, "arguments": {…}} is, under the names that families have for these."""
    if isinstance(value.get("function"), dict):
        value = value["function"]
    given = value.get(key, value.get("parameters", value.get("arguments")))
    name = value.get("name", value.get("tool_name"))
    if not isinstance(name, str):
        return None
    given = {} if given is None else given
    arguments = given if isinstance(given, str) else json.dumps(given, ensure_ascii=False)
    return Call(name, arguments, value["id"] if isinstance(value.get("id"), str) else "")


def json_object(text: str, at: int) -> tuple[dict[str, Any], int] | More | None:
    """The JSON object that begins there, behind white space, and where it ends."""
    begin = space(text, at, {})
    if begin == len(text):
        return More()
    if text[begin] != "{":
        return None
    try:
        value, end = _JSON.raw_decode(text, begin)
    except json.JSONDecodeError as error:
        return _cut_off(error, text)
    except (ValueError, RecursionError):
        return None
    return value, end


def json_value(text: str) -> Any:
    """A whole text as JSON.

    Raises:
        ValueError: it is none; NaN and infinities are none either.
        RecursionError: it is nested too deeply.
    """
    value, end = _JSON.raw_decode(text.strip())
    if end != len(text.strip()):
        raise ValueError("more follows")
    return value


def _finite(digits: str) -> float:
    value = float(digits)
    if math.isinf(value):
        raise ValueError(f"{digits} is too large")
    return value


def _no_json(spelling: str) -> Any:
    raise ValueError(f"{spelling} is no JSON")


_JSON = json.JSONDecoder(parse_float=_finite, parse_constant=_no_json)
# How a text can end within a value: in the middle of a word, of an escape, or of a number behind its last digit.
_WORDS = frozenset(("-", *(each[:size] for each in ("true", "false", "null") for size in range(1, len(each)))))
_ESCAPE = re.compile(r"\\?u?[0-9a-fA-F]{0,4}")
_NUMBER = re.compile(r"\.|[eE][+-]?")


def _cut_off(error: json.JSONDecodeError, text: str) -> More | None:
    """Whether a text is no JSON only because it ends too early."""
    if error.msg.startswith("Unterminated string"):
        return More('"\n')
    rest = text[error.pos :]
    if error.msg.startswith("Invalid \\uXXXX"):
        return More() if _ESCAPE.fullmatch(rest) else None
    if not rest.strip() or rest in _WORDS:
        return More()
    return More() if text[error.pos - 1].isdigit() and _NUMBER.fullmatch(rest) else None
