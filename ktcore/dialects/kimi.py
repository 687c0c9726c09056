"""Kimi-K2: sections of calls, each with an id that holds its function's name."""

from __future__ import annotations

import re

from ktcore.dialects.base import ToolFormat
from ktcore.dialects.reading import matching, space, title, word

_K = ("<|tool_calls_section_begin|>", "<|tool_calls_section_end|>", "<|tool_call_begin|>", "<|tool_call_end|>")
_ARGUMENTS = "<|tool_call_argument_begin|>"
_ID = re.compile(r"(?:functions\.)?(.+):\d+")


def _named(words: dict[str, str]) -> tuple[str, str] | None:
    found = _ID.fullmatch(words["id"])
    return None if found is None else (found[1], words["id"])


KIMI = ToolFormat(
    "kimi-k2",
    (_K[0], _K[2]),
    (_K[1], _K[3]),
    matching(
        *(word(_K[0], optional=True), space, word(_K[2]), space),
        *(title(r"[^\s<]+", "id"), space, word(_ARGUMENTS)),
        named=_named,
    ),
    _K[2] + "functions.{name}:0" + _ARGUMENTS + "{arguments}" + _K[3],
    section=(_K[0], _K[1]),
    ends_thoughts=True,
)
