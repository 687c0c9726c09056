"""Qwen3-Coder, Qwen3.5 and Seed-OSS: functions and parameters as tags."""

from __future__ import annotations

from dataclasses import replace

from ktcore.dialects.base import Pairs, ToolFormat
from ktcore.dialects.pairs import one_by_one
from ktcore.dialects.reading import space, title, word

_PAIRS = Pairs("<parameter=", ">", "", "</parameter>", lines=True)
# Seed-OSS writes values without newlines of the format's own.
_SEED_PAIRS = replace(_PAIRS, lines=False)
_NAMED = (space, word("<function="), title(r"[^\s<>]+"), word(">"))

QWEN3_CODER = ToolFormat(
    "qwen3-coder",
    ("<tool_call>", "<function="),
    ("</tool_call>",),
    one_by_one(_PAIRS, "</function>", word("<tool_call>", optional=True), *_NAMED),
    "<tool_call>\n<function={name}>\n{pairs}</function>\n</tool_call>",
    joint="\n",
    pairs=_PAIRS,
    ends_thoughts=True,
)
SEED = ToolFormat(
    "seed",
    ("<seed:tool_call>", "<function="),
    ("</seed:tool_call>",),
    one_by_one(_SEED_PAIRS, "</function>", word("<seed:tool_call>", optional=True), *_NAMED),
    "<seed:tool_call>\n<function={name}>\n{pairs}</function>\n</seed:tool_call>",
    joint="\n",
    pairs=_SEED_PAIRS,
    ends_thoughts=True,
)
