"""Which way of writing calls a chat template speaks of: a table of words to look for."""

from __future__ import annotations

import re

from ktcore.dialects.bare import BARE
from ktcore.dialects.base import ToolFormat
from ktcore.dialects.deepseek import CALL_BEGIN, DEEPSEEK, DEEPSEEK_V31
from ktcore.dialects.glm import GLM
from ktcore.dialects.hermes import HERMES
from ktcore.dialects.invoke import DSML, INVOKE
from ktcore.dialects.kimi import KIMI
from ktcore.dialects.listed import ACTION, LISTED, TOOLCALL
from ktcore.dialects.llama3 import LLAMA3
from ktcore.dialects.mistral import MISTRAL, MISTRAL_ARGS
from ktcore.dialects.qwen3_coder import QWEN3_CODER, SEED

_KNOWN: tuple[tuple[tuple[str, ...], ToolFormat], ...] = (
    (("<arg_key>",), GLM),
    (("<minimax:tool_call>", "<invoke "), INVOKE),
    (("｜DSML｜", "invoke"), DSML),
    (("<function=", "<seed:tool_call>"), SEED),
    (("tool_call>", "<function="), QWEN3_CODER),
    (("<tool_calls>",), LISTED),
    (("<TOOLCALL>",), TOOLCALL),
    (("<|START_ACTION|>",), ACTION),
    (("]<]minimax[>[",), BARE),
    (("<tool_call>",), HERMES),
    ((CALL_BEGIN, "```json"), DEEPSEEK),
    ((CALL_BEGIN,), DEEPSEEK_V31),
    (("<|tool_call_begin|>",), KIMI),
    (("[TOOL_CALLS]", "[ARGS]"), MISTRAL_ARGS),
    (("[TOOL_CALLS]",), MISTRAL),
    (("<|python_tag|>",), LLAMA3),
    (("<|start_header_id|>", "tools"), LLAMA3),
)


def format_in(template: str) -> ToolFormat | None:
    """The format that a chat template speaks of; None where it knows no tools."""
    for words, made in _KNOWN:
        if all(word in template for word in words):
            return made
    return BARE if re.search(r"\btools\b", template) else None
