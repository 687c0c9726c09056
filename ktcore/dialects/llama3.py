"""LLaMA 3: a bare JSON object, or one behind a tag."""

from __future__ import annotations

from ktcore.dialects.base import ToolFormat
from ktcore.dialects.reading import tagged

LLAMA3 = ToolFormat(
    "llama-3",
    ("<|python_tag|>",),
    (";",),
    tagged("<|python_tag|>", "parameters"),
    '{"name": "{name}", "parameters": {arguments}}',
    bare=True,
    series=True,
)
