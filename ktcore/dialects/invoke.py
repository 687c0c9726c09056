"""A list in XML's clothes: MiniMax-M2, and DeepSeek from V3.2 on (DSML), whose marks have a bar before each word."""

from __future__ import annotations

from ktcore.dialects.base import Pairs, ToolFormat
from ktcore.dialects.pairs import one_by_one
from ktcore.dialects.reading import space, title, word

_PAIRS = Pairs('<parameter name="', '"', ">", "</parameter>")
_DSML_PAIRS = Pairs('<｜DSML｜parameter name="', '"', ">", "</｜DSML｜parameter>", typed=True)
_NAME = title(r'[^"<>\n]+')

INVOKE = ToolFormat(
    "invoke",
    ("<minimax:tool_call>", "<invoke "),
    ("</minimax:tool_call>",),
    one_by_one(
        _PAIRS,
        "</invoke>",
        *(word("<minimax:tool_call>", optional=True), space, word('<invoke name="'), _NAME, word('">')),
    ),
    '<invoke name="{name}">\n{pairs}</invoke>\n',
    section=("<minimax:tool_call>\n", "</minimax:tool_call>"),
    joint="",
    pairs=_PAIRS,
    ends_thoughts=True,
)
DSML = ToolFormat(
    "dsml",
    ("<｜DSML｜function_calls>", "<｜DSML｜tool_calls>", "<｜DSML｜invoke "),
    ("</｜DSML｜function_calls>", "</｜DSML｜tool_calls>"),
    one_by_one(
        _DSML_PAIRS,
        "</｜DSML｜invoke>",
        *(word("<｜DSML｜function_calls>", "<｜DSML｜tool_calls>", optional=True), space),
        *(word('<｜DSML｜invoke name="'), _NAME, word('">')),
    ),
    '<｜DSML｜invoke name="{name}">\n{pairs}</｜DSML｜invoke>\n',
    section=("<｜DSML｜function_calls>\n", "</｜DSML｜function_calls>"),
    joint="",
    pairs=_DSML_PAIRS,
    ends_thoughts=True,
)
