"""Lists of JSON objects between tags: Phi, Nemotron, Command."""

from __future__ import annotations

from dataclasses import replace

from ktcore.dialects.base import ToolFormat
from ktcore.dialects.reading import listed

LISTED = ToolFormat(
    "listed",
    ("<tool_calls>",),
    ("</tool_calls>",),
    listed("<tool_calls>"),
    '{"name": "{name}", "arguments": {arguments}}',
    section=("<tool_calls>[", "]</tool_calls>"),
    joint=", ",
    series=True,
)
TOOLCALL = replace(
    LISTED,
    name="toolcall",
    marks=("<TOOLCALL>",),
    ends=("</TOOLCALL>",),
    read=listed("<TOOLCALL>"),
    section=("<TOOLCALL>[", "]</TOOLCALL>"),
)
ACTION = replace(
    LISTED,
    name="action",
    marks=("<|START_ACTION|>",),
    ends=("<|END_ACTION|>",),
    read=listed("<|START_ACTION|>"),
    forced='{"tool_call_id": "0", "tool_name": "{name}", "parameters": {arguments}}',
    section=("<|START_ACTION|>[", "]<|END_ACTION|>"),
)
