"""How model families write calls of tools into their answers: a registry, told apart by what the chat template says."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

_JSON = json.JSONDecoder()


@dataclass(frozen=True)
class Call:
    """A call of a tool.

    Attributes:
        arguments: a JSON object as text.
        id: the model's own name for the call, if it gives one.
    """

    name: str
    arguments: str
    id: str = ""


Read = Callable[[str, Mapping[str, Any]], "tuple[list[Call], int] | None"]
"""(text from the format's first mark on, tools by name) -> calls and how many characters they take; None: none yet."""


@dataclass(frozen=True)
class ToolFormat:
    """Attributes:
    marks: each begins a call, or several.
    ends: spellings between and after calls that are no text of the answer.
    read: reads the first call.
    forced: how a call must begin, go on and end: text around `{name}` and `{arguments}`.
    section: what stands before the first call and after the last one.
    joint: what stands between two calls; None: a forced answer has one call.
    bare: an answer that begins with a brace is a call too.
    series: and so is a brace behind a call.
    """

    name: str
    marks: tuple[str, ...]
    ends: tuple[str, ...]
    read: Read
    forced: str
    section: tuple[str, str] = ("", "")
    joint: str | None = None
    bare: bool = False
    series: bool = False

    @property
    def spellings(self) -> tuple[str, ...]:
        """All that is written around calls."""
        return self.marks + self.ends


def format_in(template: str) -> ToolFormat | None:
    """The format that a chat template speaks of; None where it knows no tools."""
    for words, made in _KNOWN:
        if all(word in template for word in words):
            return made
    return BARE if re.search(r"\btools\b", template) else None


def _named_json(text: str, key: str = "arguments") -> tuple[Call, int] | None:
    """{"name": …, "arguments": {…}} at the beginning of a text."""
    found = _object(text)
    if found is None:
        return None
    value, size = found
    if isinstance(value.get("function"), dict):
        value = value["function"]
    given = value.get(key, value.get("parameters", value.get("arguments", {})))
    name = value.get("name", value.get("tool_name"))
    if not isinstance(name, str):
        return None
    arguments = given if isinstance(given, str) else json.dumps(given, ensure_ascii=False)
    return Call(name, arguments, value["id"] if isinstance(value.get("id"), str) else ""), size


def _object(text: str) -> tuple[dict[str, Any], int] | None:
    skipped = len(text) - len(text.lstrip())
    try:
        value, end = _JSON.raw_decode(text, skipped)
    except (ValueError, RecursionError):
        return None
    return (value, end) if isinstance(value, dict) else None


def _tagged(mark: str, end: str, key: str = "arguments") -> Read:
    def read(text: str, tools: Mapping[str, Any]) -> tuple[list[Call], int] | None:
        found = _named_json(text[len(mark) :] if text.startswith(mark) else text, key)
        if found is None:
            return None
        call, size = found
        return [call], size + (len(mark) if text.startswith(mark) else 0)

    return read


def _matching(pattern: str) -> Read:
    """By an expression with a group `name` before a JSON object, and maybe a group `id`."""
    expression = re.compile(pattern, re.DOTALL)

    def read(text: str, tools: Mapping[str, Any]) -> tuple[list[Call], int] | None:
        head = expression.match(text)
        if head is None:
            return None
        found = _object(text[head.end() :])
        if found is None:
            return None
        given = head.groupdict().get("id") or ""
        return [Call(head["name"].strip(), json.dumps(found[0], ensure_ascii=False), given)], head.end() + found[1]

    return read


def _listed(*marks: str) -> Read:
    """A list of objects, or one after the other, behind a mark."""

    def read(text: str, tools: Mapping[str, Any]) -> tuple[list[Call], int] | None:
        mark = next((mark for mark in marks if text.startswith(mark)), "")
        body = text[len(mark) :]
        if not body.lstrip().startswith("["):
            found = _named_json(body)
            return None if found is None else ([found[0]], len(mark) + found[1])
        try:
            values, end = _JSON.raw_decode(body, len(body) - len(body.lstrip()))
        except (ValueError, RecursionError):
            return None
        calls = [_named_json(json.dumps(value)) for value in values]
        return [call[0] for call in calls if call is not None], len(mark) + end

    return read


def _mistral(text: str, tools: Mapping[str, Any]) -> tuple[list[Call], int] | None:
    """A list of objects, or in newer models a name, [ARGS] and an object."""
    old = text.removeprefix("[TOOL_CALLS]").lstrip().startswith("[")
    return (_listed("[TOOL_CALLS]") if old else _NEW_MISTRAL)(text, tools)


_NEW_MISTRAL = _matching(r"\[TOOL_CALLS\]\s*(?P<name>[^\[{\s]+)\s*(?:\[CALL_ID\](?P<id>[^\[]*))?(?:\[ARGS\])?\s*(?={)")


def _pairs(call: str, name: str, pair: str) -> Read:
    """Arguments one by one, as text: what the tool's schema does not call a string is read as JSON."""
    whole, named, each = (re.compile(p, re.DOTALL) for p in (call, name, pair))

    def read(text: str, tools: Mapping[str, Any]) -> tuple[list[Call], int] | None:
        found = whole.match(text)
        title = found and named.search(found[0])
        if not found or not title:
            return None
        kinds = tools.get(title[1].strip(), {}).get("properties", {})
        arguments = {key.strip(): _value(value, kinds.get(key.strip())) for key, value in each.findall(found[0])}
        return [Call(title[1].strip(), json.dumps(arguments, ensure_ascii=False))], found.end()

    return read


def _value(text: str, schema: Any) -> Any:
    text = text.removeprefix("\n").removesuffix("\n")
    if isinstance(schema, dict) and schema.get("type") == "string":
        return text
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


_D = (
    "<｜tool▁calls▁begin｜>",
    "<｜tool▁calls▁end｜>",
    "<｜tool▁call▁begin｜>",
    "<｜tool▁sep｜>",
    "<｜tool▁call▁end｜>",
)
_K = ("<|tool_calls_section_begin|>", "<|tool_calls_section_end|>", "<|tool_call_begin|>", "<|tool_call_end|>")
_KIMI_ARGUMENTS = "<|tool_call_argument_begin|>"
_HERMES_CALL = '<tool_call>\n{"name": "{name}", "arguments": {arguments}}\n</tool_call>'

HERMES = ToolFormat(
    "hermes",
    ("<tool_call>",),
    ("</tool_call>",),
    _tagged("<tool_call>", "</tool_call>"),
    _HERMES_CALL,
    joint="\n",
)
GLM = ToolFormat(
    "glm",
    ("<tool_call>",),
    ("</tool_call>",),
    _pairs(
        r"<tool_call>.*?</tool_call>",
        r"<tool_call>\s*([^<\n]+)",
        r"<arg_key>(.*?)</arg_key>\s*<arg_value>(.*?)</arg_value>",
    ),
    "<tool_call>{name}\n{pairs}</tool_call>",
    joint="\n",
)
QWEN3_CODER = ToolFormat(
    "qwen3-coder",
    ("<tool_call>", "<seed:tool_call>", "<function="),
    ("</tool_call>", "</seed:tool_call>"),
    _pairs(
        r"(?:<(?:seed:)?tool_call>\s*)?<function=.*?</function>",
        r"<function=([^>]+)>",
        r"<parameter=([^>]+)>(.*?)</parameter>",
    ),
    "<tool_call>\n<function={name}>\n{pairs}</function>\n</tool_call>",
    joint="\n",
)
DEEPSEEK = ToolFormat(
    "deepseek",
    (_D[0], _D[2]),
    (_D[1], _D[4], "```"),
    _matching(rf"(?:{_D[0]}\s*)?{_D[2]}\s*(?:function\s*{_D[3]})?\s*(?P<name>[^\n<]+?)\s*```json\s*"),
    _D[2] + "function" + _D[3] + "{name}\n```json\n{arguments}\n```" + _D[4],
    section=(_D[0], _D[1]),
    joint="\n",
)
DEEPSEEK_V31 = ToolFormat(
    "deepseek-v3.1",
    (_D[0], _D[2]),
    (_D[1], _D[4]),
    _matching(rf"(?:{_D[0]}\s*)?{_D[2]}\s*(?P<name>[^<]+?){_D[3]}\s*"),
    _D[2] + "{name}" + _D[3] + "{arguments}" + _D[4],
    section=(_D[0], _D[1]),
    joint="",
)
KIMI = ToolFormat(
    "kimi-k2",
    (_K[0], _K[2]),
    (_K[1], _K[3]),
    _matching(
        r"(?:<\|tool_calls_section_begin\|>\s*)?<\|tool_call_begin\|>\s*"
        r"(?P<id>(?:functions\.)?(?P<name>[^<]+?):\d+)\s*<\|tool_call_argument_begin\|>\s*"
    ),
    _K[2] + "functions.{name}:0" + _KIMI_ARGUMENTS + "{arguments}" + _K[3],
    section=(_K[0], _K[1]),
)
MISTRAL = ToolFormat(
    "mistral",
    ("[TOOL_CALLS]",),
    (),
    _mistral,
    '{"name": "{name}", "arguments": {arguments}}',
    section=("[TOOL_CALLS][", "]"),
    joint=", ",
)
MISTRAL_ARGS = ToolFormat(
    "mistral-args", ("[TOOL_CALLS]",), (), _mistral, "[TOOL_CALLS]{name}[ARGS]{arguments}", joint=""
)
LLAMA3 = ToolFormat(
    "llama-3",
    ("<|python_tag|>",),
    (";",),
    _tagged("<|python_tag|>", "", "parameters"),
    '{"name": "{name}", "parameters": {arguments}}',
    bare=True,
    series=True,
)
# A list in XML's clothes: MiniMax-M2, and DeepSeek from V3.2 on, whose marks have a bar before each word.
INVOKE = ToolFormat(
    "invoke",
    ("<minimax:tool_call>", "<｜DSML｜function_calls>", "<｜DSML｜tool_calls>", "<invoke ", "<｜DSML｜invoke "),
    ("</minimax:tool_call>", "</｜DSML｜function_calls>", "</｜DSML｜tool_calls>"),
    _pairs(
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
LISTED = ToolFormat(
    "listed",
    ("<tool_calls>",),
    ("</tool_calls>",),
    _listed("<tool_calls>"),
    '{"name": "{name}", "arguments": {arguments}}',
    section=("<tool_calls>[", "]</tool_calls>"),
    joint=", ",
    series=True,
)
TOOLCALL = replace(
    LISTED,
    name="toolcall",
    marks=("<TOOLCALL>",),
    ends=("</TOOLCALL>",),
    read=_listed("<TOOLCALL>"),
    section=("<TOOLCALL>[", "]</TOOLCALL>"),
)
ACTION = replace(
    LISTED,
    name="action",
    marks=("<|START_ACTION|>",),
    ends=("<|END_ACTION|>",),
    read=_listed("<|START_ACTION|>"),
    forced='{"tool_call_id": "0", "tool_name": "{name}", "parameters": {arguments}}',
    section=("<|START_ACTION|>[", "]<|END_ACTION|>"),
)
HARMONY = ToolFormat(
    "harmony",
    (),
    (),
    _tagged("", ""),
    "<|channel|>commentary to=functions.{name} <|constrain|>json<|message|>{arguments}",
)
BARE = ToolFormat("bare", (), (), _tagged("", ""), '{"name": "{name}", "arguments": {arguments}}', bare=True)

_KNOWN: tuple[tuple[tuple[str, ...], ToolFormat], ...] = (
    (("<arg_key>",), GLM),
    (("<minimax:tool_call>", "<invoke "), INVOKE),
    (("｜DSML｜", "invoke"), DSML),
    (("tool_call>", "<function="), QWEN3_CODER),
    (("<tool_calls>",), LISTED),
    (("<TOOLCALL>",), TOOLCALL),
    (("<|START_ACTION|>",), ACTION),
    (("]<]minimax[>[",), BARE),
    (("<tool_call>",), HERMES),
    ((_D[2], "```json"), DEEPSEEK),
    ((_D[2],), DEEPSEEK_V31),
    (("<|tool_call_begin|>",), KIMI),
    (("[TOOL_CALLS]", "[ARGS]"), MISTRAL_ARGS),
    (("[TOOL_CALLS]",), MISTRAL),
    (("<|python_tag|>",), LLAMA3),
    (("<|start_header_id|>", "tools"), LLAMA3),
)
