"""Readers that several ways of writing calls share: JSON objects, alone or listed, and arguments one by one."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from ktcore.dialects.base import Call, Read

_JSON = json.JSONDecoder()


def named_json(text: str, key: str = "arguments") -> tuple[Call, int] | None:
    """{"name": …, "arguments": {…}} at the beginning of a text."""
    found = json_object(text)
    if found is None:
        return None
    value, size = found
    if isinstance(value.get("function"), dict):
        value = value["function"]
    given = value.get(key, value.get("parameters", value.get("arguments", {})))
    name = value.get("name", value.get("tool_name"))
    if not isinstance(name, str):
        return None
    arguments = given if isinstance(given, str) else json.dumps(given, ensure_ascii=False)
    return Call(name, arguments, value["id"] if isinstance(value.get("id"), str) else ""), size


def json_object(text: str) -> tuple[dict[str, Any], int] | None:
    skipped = len(text) - len(text.lstrip())
    try:
        value, end = _JSON.raw_decode(text, skipped)
    except (ValueError, RecursionError):
        return None
    return (value, end) if isinstance(value, dict) else None


def tagged(mark: str, end: str, key: str = "arguments") -> Read:
    def read(text: str, tools: Mapping[str, Any]) -> tuple[list[Call], int] | None:
        found = named_json(text[len(mark) :] if text.startswith(mark) else text, key)
        if found is None:
            return None
        call, size = found
        return [call], size + (len(mark) if text.startswith(mark) else 0)

    return read


def matching(pattern: str) -> Read:
    """By an expression with a group `name` before a JSON object, and maybe a group `id`."""
    expression = re.compile(pattern, re.DOTALL)

    def read(text: str, tools: Mapping[str, Any]) -> tuple[list[Call], int] | None:
        head = expression.match(text)
        if head is None:
            return None
        found = json_object(text[head.end() :])
        if found is None:
            return None
        given = head.groupdict().get("id") or ""
        return [Call(head["name"].strip(), json.dumps(found[0], ensure_ascii=False), given)], head.end() + found[1]

    return read


def listed(*marks: str) -> Read:
    """A list of objects, or one after the other, behind a mark."""

    def read(text: str, tools: Mapping[str, Any]) -> tuple[list[Call], int] | None:
        mark = next((mark for mark in marks if text.startswith(mark)), "")
        body = text[len(mark) :]
        if not body.lstrip().startswith("["):
            found = named_json(body)
            return None if found is None else ([found[0]], len(mark) + found[1])
        try:
            values, end = _JSON.raw_decode(body, len(body) - len(body.lstrip()))
        except (ValueError, RecursionError):
            return None
        calls = [named_json(json.dumps(value)) for value in values]
        return [call[0] for call in calls if call is not None], len(mark) + end

    return read


def pairs(call: str, name: str, pair: str) -> Read:
    """Arguments one by one, as text: what the tool's schema does not call a string is read as JSON."""
    whole, named, each = (re.compile(p, re.DOTALL) for p in (call, name, pair))

    def read(text: str, tools: Mapping[str, Any]) -> tuple[list[Call], int] | None:
        found = whole.match(text)
        title = found and named.search(found[0])
        if not found or not title:
            return None
        kinds = tools.get(title[1].strip(), {}).get("properties", {})
        arguments = {key.strip(): _value(value, kinds.get(key.strip())) for key, value in each.findall(found[0])}
        return [Call(title[1].strip(), json.dumps(arguments, ensure_ascii=False))], found.end()

    return read


def _value(text: str, schema: Any) -> Any:
    text = text.removeprefix("\n").removesuffix("\n")
    if isinstance(schema, dict) and schema.get("type") == "string":
        return text
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text
