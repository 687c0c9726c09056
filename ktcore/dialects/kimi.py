"""Kimi-K2: sections of calls, each with an id that holds its function's name."""

from __future__ import annotations

from ktcore.dialects.base import ToolFormat
from ktcore.dialects.reading import matching

_K = ("<|tool_calls_section_begin|>", "<|tool_calls_section_end|>", "<|tool_call_begin|>", "<|tool_call_end|>")
_KIMI_ARGUMENTS = "<|tool_call_argument_begin|>"

KIMI = ToolFormat(
    "kimi-k2",
    (_K[0], _K[2]),
    (_K[1], _K[3]),
    matching(
        r"(?:<\|tool_calls_section_begin\|>\s*)?<\|tool_call_begin\|>\s*"
        r"(?P<id>(?:functions\.)?(?P<name>[^<]+?):\d+)\s*<\|tool_call_argument_begin\|>\s*"
    ),
    _K[2] + "functions.{name}:0" + _KIMI_ARGUMENTS + "{arguments}" + _K[3],
    section=(_K[0], _K[1]),
)
