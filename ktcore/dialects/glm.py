"""GLM-4.5 and later: a name, then keys and values between tags of their own."""

from __future__ import annotations

from ktcore.dialects.base import Pairs, ToolFormat
from ktcore.dialects.pairs import one_by_one
from ktcore.dialects.reading import space, title, word

_PAIRS = Pairs("<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>", gap="\n")

GLM = ToolFormat(
    "glm",
    ("<tool_call>",),
    ("</tool_call>",),
    one_by_one(_PAIRS, "</tool_call>", word("<tool_call>"), space, title(r"[^\s<]+")),
    "<tool_call>{name}\n{pairs}</tool_call>",
    joint="\n",
    pairs=_PAIRS,
    ends_thoughts=True,
)
