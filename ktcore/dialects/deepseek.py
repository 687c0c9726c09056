"""DeepSeek-V3, R1 and V3.1: marks of their own around a name and a JSON object."""

from __future__ import annotations

from ktcore.dialects.base import ToolFormat
from ktcore.dialects.reading import matching

_D = (
    "<｜tool▁calls▁begin｜>",
    "<｜tool▁calls▁end｜>",
    "<｜tool▁call▁begin｜>",
    "<｜tool▁sep｜>",
    "<｜tool▁call▁end｜>",
)
CALL_BEGIN = _D[2]

DEEPSEEK = ToolFormat(
    "deepseek",
    (_D[0], _D[2]),
    (_D[1], _D[4], "```"),
    matching(rf"(?:{_D[0]}\s*)?{_D[2]}\s*(?:function\s*{_D[3]})?\s*(?P<name>[^\n<]+?)\s*```json\s*"),
    _D[2] + "function" + _D[3] + "{name}\n```json\n{arguments}\n```" + _D[4],
    section=(_D[0], _D[1]),
    joint="\n",
)
DEEPSEEK_V31 = ToolFormat(
    "deepseek-v3.1",
    (_D[0], _D[2]),
    (_D[1], _D[4]),
    matching(rf"(?:{_D[0]}\s*)?{_D[2]}\s*(?P<name>[^<]+?){_D[3]}\s*"),
    _D[2] + "{name}" + _D[3] + "{arguments}" + _D[4],
    section=(_D[0], _D[1]),
    joint="",
)
