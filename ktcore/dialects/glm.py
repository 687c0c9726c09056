"""GLM-4.5 and later: a name, then keys and values between tags of their own."""

from __future__ import annotations

from ktcore.dialects.base import ToolFormat
from ktcore.dialects.reading import pairs

GLM = ToolFormat(
    "glm",
    ("<tool_call>",),
    ("</tool_call>",),
    pairs(
        r"<tool_call>.*?</tool_call>",
        r"<tool_call>\s*([^<\n]+)",
        r"<arg_key>(.*?)</arg_key>\s*<arg_value>(.*?)</arg_value>",
    ),
    "<tool_call>{name}\n{pairs}</tool_call>",
    joint="\n",
)
