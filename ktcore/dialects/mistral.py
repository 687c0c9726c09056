"""Mistral: a list of objects, or in newer models a name, [ARGS] and an object."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ktcore.dialects.base import Call, ToolFormat
from ktcore.dialects.reading import listed, matching


def _mistral(text: str, tools: Mapping[str, Any]) -> tuple[list[Call], int] | None:
    """A list of objects, or in newer models a name, [ARGS] and an object."""
    old = text.removeprefix("[TOOL_CALLS]").lstrip().startswith("[")
    return (listed("[TOOL_CALLS]") if old else _NEW_MISTRAL)(text, tools)


_NEW_MISTRAL = matching(r"\[TOOL_CALLS\]\s*(?P<name>[^\[{\s]+)\s*(?:\[CALL_ID\](?P<id>[^\[]*))?(?:\[ARGS\])?\s*(?={)")


MISTRAL = ToolFormat(
    "mistral",
    ("[TOOL_CALLS]",),
    (),
    _mistral,
    '{"name": "{name}", "arguments": {arguments}}',
    section=("[TOOL_CALLS][", "]"),
    joint=", ",
)
MISTRAL_ARGS = ToolFormat(
    "mistral-args", ("[TOOL_CALLS]",), (), _mistral, "[TOOL_CALLS]{name}[ARGS]{arguments}", joint=""
)
