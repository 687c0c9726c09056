"""Calls of earlier turns as a chat template wants them: arguments as text or objects, and content empty or none."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ktcore.dialects.reading import json_value
from ktcore.errors import KtcoreError
from ktcore.text.chat_template import render

_NAME, _KEY, _VALUE = "probe_tool", "probe_key", "probe_value"
# Templates differ, and none says how: some lose calls where content is not none, some fail where it is.
_WAYS: tuple[tuple[str | None, bool], ...] = (("", False), (None, False), ("", True), (None, True))


def earlier_calls(
    source: str, messages: Sequence[Mapping[str, Any]], names: Mapping[str, str]
) -> Sequence[Mapping[str, Any]]:
    """Messages whose calls the template will show; those without calls stay as they are.

    Args:
        source: the template.
        messages: with arguments as JSON text.
        names: what the template knows as bos_token, eos_token and so on.
        Arguments that are no JSON object, as models write them at times, are given as they are.
    """
    if not any(message.get("tool_calls") for message in messages):
        return [_content(message, "") for message in messages]
    empty, as_text = _way(source, names)
    return [_as(message, empty, as_text, lambda odd: _odd(source, names, empty, odd)) for message in messages]


def _way(source: str, names: Mapping[str, str]) -> tuple[str | None, bool]:
    """The first way in which the template shows a call, found by trying them."""
    for empty, as_text in _WAYS:
        text = _tried(source, names, empty, json.dumps({_KEY: _VALUE}) if as_text else {_KEY: _VALUE})
        # a backslash before a quote: text was made text of once more
        if _NAME in text and _KEY in text and _VALUE in text and f'{_KEY}\\"' not in text:
            return empty, as_text
    return _WAYS[0]


def _odd(source: str, names: Mapping[str, str], empty: str | None, value: Any) -> Any:
    """Arguments that are no object: themselves where the template shows such, else under a key."""
    text = _tried(source, names, empty, [_VALUE] if isinstance(value, list) else _VALUE)
    return value if _NAME in text and _VALUE in text else {"arguments": value}


def _tried(source: str, names: Mapping[str, str], empty: str | None, arguments: Any) -> str:
    """What the template makes of a call; nothing where it fails."""
    function = {"name": _NAME, "arguments": arguments}
    # nine letters: Mistral's templates refuse other ids
    call = {"id": "probe0000", "type": "function", "function": function}
    tool = {"type": "function", "function": {"name": "other", "description": "", "parameters": {"type": "object"}}}
    messages: list[dict[str, Any]] = [
        {"role": "user", "content": "?"},
        {"role": "assistant", "content": empty, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "probe0000", "name": _NAME, "content": "!"},
    ]
    variables = {**names, "tools": [tool], "documents": None, "add_generation_prompt": True}
    try:
        return render(source, messages, variables, "")
    except KtcoreError:
        return ""


def _as(message: Mapping[str, Any], empty: str | None, as_text: bool, odd: Callable[[Any], Any]) -> Mapping[str, Any]:
    if not message.get("tool_calls"):
        return _content(message, "")
    calls = []
    for call in message["tool_calls"]:
        function = call["function"]
        given = function["arguments"]
        found = given if as_text else _parsed(given)
        if not as_text and not isinstance(found, dict):
            found = odd(found)
        calls.append({**call, "function": {**function, "arguments": found}})
    return {**_content(message, empty), "tool_calls": calls}


def _content(message: Mapping[str, Any], empty: str | None) -> Mapping[str, Any]:
    return message if message.get("content") else {**message, "content": empty}


def _parsed(arguments: str) -> Any:
    """JSON as what it says, and what is none as the text that it is."""
    try:
        return json_value(arguments) if arguments.strip() else {}
    except (ValueError, RecursionError):
        return arguments
