"""A list in XML's clothes: MiniMax-M2, and DeepSeek from V3.2 on (DSML), whose marks have a bar before each word."""

from __future__ import annotations

from dataclasses import replace

from ktcore.dialects.base import ToolFormat
from ktcore.dialects.reading import pairs

INVOKE = ToolFormat(
    "invoke",
    ("<minimax:tool_call>", "<｜DSML｜function_calls>", "<｜DSML｜tool_calls>", "<invoke ", "<｜DSML｜invoke "),
    ("</minimax:tool_call>", "</｜DSML｜function_calls>", "</｜DSML｜tool_calls>"),
    pairs(
        r"(?:<(?:minimax:tool_call|｜DSML｜function_calls|｜DSML｜tool_calls)>\s*)?"
        r"<(?:｜DSML｜)?invoke .*?</(?:｜DSML｜)?invoke>",
        r"<(?:｜DSML｜)?invoke name=\"([^\"]+)\"",
        r"<(?:｜DSML｜)?parameter name=\"([^\"]+)\"[^>]*>(.*?)</(?:｜DSML｜)?parameter>",
    ),
    '<invoke name="{name}">\n{pairs}</invoke>\n',
    section=("<minimax:tool_call>\n", "</minimax:tool_call>"),
    joint="",
)
DSML = replace(
    INVOKE,
    name="dsml",
    forced='<｜DSML｜invoke name="{name}">\n{pairs}</｜DSML｜invoke>\n',
    section=("<｜DSML｜function_calls>\n", "</｜DSML｜function_calls>"),
    joint="",
)
