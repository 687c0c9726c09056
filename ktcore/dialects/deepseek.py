"""DeepSeek-V3, R1 and V3.1: marks of their own around a name and a JSON object."""

from __future__ import annotations

from ktcore.dialects.base import ToolFormat
from ktcore.dialects.reading import matching, space, title, word

_D = (
    "<｜tool▁calls▁begin｜>",
    "<｜tool▁calls▁end｜>",
    "<｜tool▁call▁begin｜>",
    "<｜tool▁sep｜>",
    "<｜tool▁call▁end｜>",
)
CALL_BEGIN = _D[2]
_BEGIN = (word(_D[0], optional=True), space, word(_D[2]), space)

DEEPSEEK = ToolFormat(
    "deepseek",
    (_D[0], _D[2]),
    (_D[1], _D[4], "```"),
    matching(*_BEGIN, word("function" + _D[3], optional=True), space, title(r"[^\s<`]+"), space, word("```json")),
    _D[2] + "function" + _D[3] + "{name}\n```json\n{arguments}\n```" + _D[4],
    section=(_D[0], _D[1]),
    joint="\n",
)
DEEPSEEK_V31 = ToolFormat(
    "deepseek-v3.1",
    (_D[0], _D[2]),
    (_D[1], _D[4]),
    matching(*_BEGIN, title(r"[^\s<]+"), space, word(_D[3])),
    _D[2] + "{name}" + _D[3] + "{arguments}" + _D[4],
    section=(_D[0], _D[1]),
    joint="",
)
