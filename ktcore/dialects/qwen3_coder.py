"""Qwen3-Coder, Qwen3.5 and Seed-OSS: functions and parameters as tags."""

from __future__ import annotations

from ktcore.dialects.base import ToolFormat
from ktcore.dialects.reading import pairs

QWEN3_CODER = ToolFormat(
    "qwen3-coder",
    ("<tool_call>", "<seed:tool_call>", "<function="),
    ("</tool_call>", "</seed:tool_call>"),
    pairs(
        r"(?:<(?:seed:)?tool_call>\s*)?<function=.*?</function>",
        r"<function=([^>]+)>",
        r"<parameter=([^>]+)>(.*?)</parameter>",
    ),
    "<tool_call>\n<function={name}>\n{pairs}</function>\n</tool_call>",
    joint="\n",
)
