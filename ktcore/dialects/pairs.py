"""Reads calls whose arguments are written one by one, as text between marks; the tool's schema tells their types."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from ktcore.dialects.base import Call, Found, More, Pairs, Read, Seen
from ktcore.dialects.reading import Step, follow, json_value, space, word
from ktcore.dialects.schema import argument_of, fits, types_of

# Python's spellings, which some templates write: a model has learnt them from its own history.
_PYTHON = {"True": True, "False": False, "None": None}


def one_by_one(pairs: Pairs, end: str, *head: Step) -> Read:
    """Steps that name the tool, then pairs of keys and values up to an end."""

    def read(text: str, tools: Mapping[str, Any]) -> Seen:
        named = follow(head, text)
        if not isinstance(named, tuple):
            return named
        at, name = named[0], named[1]["name"]
        schema = tools.get(name, {})
        arguments: dict[str, Any] = {}
        while True:
            at = space(text, at, {})
            over = word(end)(text, at, {})
            if isinstance(over, int):
                return Found((Call(name, json.dumps(arguments, ensure_ascii=False)),), over)
            found = _pair(pairs, text, at, schema)
            if not isinstance(found, tuple):
                return over if found is None else found
            key, arguments[key], at = found[0], found[1], found[2]

    return read


def value_of(text: str, schema: Any, root: Any) -> Any:
    """What an argument written as text is.

    JSON of a type other than string, where the schema allows that type; else the text itself, where it allows a string;
    else whatever JSON it is. So "90210" of a parameter that is a string or null stays a string, and "null" is null.

    Args:
        root: the whole schema, for references.
    """
    try:
        value = json_value(text)
    except (ValueError, RecursionError):
        value = text
    other = not isinstance(value, str)
    if other and fits(value, schema, root):
        return value
    if "string" in types_of(schema, root):
        return text
    if text.strip() in _PYTHON and fits(_PYTHON[text.strip()], schema, root):
        return _PYTHON[text.strip()]
    return value


def _pair(pairs: Pairs, text: str, at: int, schema: Any) -> tuple[str, Any, int] | More | None:
    """A key, its value, and where they end."""
    begun = word(pairs.opens)(text, at, {})
    if not isinstance(begun, int):
        return begun
    behind = text.find(pairs.named, begun)
    key = text[begun : behind if behind >= 0 else len(text)]
    if "\n" in key or (behind >= 0 and "<" in key):
        return None
    if behind < 0:
        return More()
    behind += len(pairs.named)
    opened = text.find(pairs.begins, behind)
    between = text[behind : opened if opened >= 0 else len(text)]
    if opened < 0 and pairs.begins.startswith(between.lstrip()):
        return More()
    if re.search("[<>]", between):
        return None
    if opened < 0:
        return More()
    opened += len(pairs.begins)
    closed = text.find(pairs.closes, opened)
    if closed < 0:
        return More(pairs.closes[-1])
    said = text[opened:closed]
    if pairs.lines:
        said = said.removeprefix("\n").removesuffix("\n")
    key = key.strip()
    return key, _value(pairs, between, said, argument_of(schema, key), schema), closed + len(pairs.closes)


def _value(pairs: Pairs, attributes: str, said: str, schema: Any, root: Any) -> Any:
    if pairs.typed and 'string="true"' in attributes:
        return said
    if pairs.typed and 'string="false"' in attributes:
        try:
            return json_value(said)
        except (ValueError, RecursionError):
            return said
    return value_of(said, schema, root)
