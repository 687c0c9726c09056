"""Custom tools take text: the model sees a function with one argument, and its calls are told as text again."""

from __future__ import annotations

import json
from typing import Any

INPUT = "input"
"""The one argument of a custom tool, as the model sees it."""


def offered(name: str, description: str | None, grammar: str | None) -> dict[str, Any]:
    """As chat templates take it; a grammar that the text should follow is told to the model, not enforced."""
    told = "\n\n".join(filter(None, (description, grammar and f"The input follows this grammar:\n{grammar}")))
    properties = {INPUT: {"type": "string"}}
    parameters = {"type": "object", "properties": properties, "required": [INPUT], "additionalProperties": False}
    described = {"description": told} if told else {}
    return {"type": "function", "function": {"name": name, **described, "parameters": parameters}}


def earlier_call(call_id: str, name: str, text: str) -> dict[str, Any]:
    """A call made earlier, as chat templates take it."""
    function = {"name": name, "arguments": json.dumps({INPUT: text}, ensure_ascii=False)}
    return {"id": call_id, "type": "function", "function": function}


def text_of_call(arguments: str) -> str:
    """The text that a call gives; arguments that hold none are its text as they are."""
    try:
        value = json.loads(arguments)
    except (ValueError, RecursionError):
        return arguments
    found = value.get(INPUT) if isinstance(value, dict) else None
    return found if isinstance(found, str) else arguments
