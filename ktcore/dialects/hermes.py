"""Hermes and Qwen: a JSON object between tags."""

from __future__ import annotations

from ktcore.dialects.base import ToolFormat
from ktcore.dialects.reading import tagged

HERMES = ToolFormat(
    "hermes",
    ("<tool_call>",),
    ("</tool_call>",),
    tagged("<tool_call>"),
    '<tool_call>\n{"name": "{name}", "arguments": {arguments}}\n</tool_call>',
    joint="\n",
)
