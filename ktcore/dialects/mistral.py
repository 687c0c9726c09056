"""Mistral: a list of objects, or in newer models a name, [ARGS] and an object."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ktcore.dialects.base import More, Seen, ToolFormat
from ktcore.dialects.reading import listed, matching, space, title, word

_MARK = "[TOOL_CALLS]"


def _id(text: str, at: int, named: dict[str, str]) -> int | More | None:
    """The call's id, where newer models write one."""
    end = word("[CALL_ID]", optional=True)(text, at, named)
    return title(r"[^\[{]+", "id")(text, end, named) if isinstance(end, int) and end > at else end


_LISTED = listed(_MARK)
_NAMED = matching(word(_MARK), space, title(r"[^\[{\s]+"), space, _id, word("[ARGS]", optional=True))


def _mistral(text: str, tools: Mapping[str, Any]) -> Seen:
    """A list of objects, or in newer models a name, [ARGS] and an object."""
    old = text.removeprefix(_MARK).lstrip().startswith("[")
    return (_LISTED if old else _NAMED)(text, tools)


MISTRAL = ToolFormat(
    "mistral",
    (_MARK,),
    (),
    _mistral,
    '{"name": "{name}", "arguments": {arguments}}',
    section=("[TOOL_CALLS][", "]"),
    joint=", ",
)
MISTRAL_ARGS = ToolFormat("mistral-args", (_MARK,), (), _mistral, "[TOOL_CALLS]{name}[ARGS]{arguments}", joint="")
