"""Answers taken apart: thoughts, text and calls, as model families write them, whole and letter by letter."""

from __future__ import annotations

import json
from typing import Any

import pytest

pytest.importorskip("fastapi", reason="needs the extra `server`")

from ktcore.server.calls import Calls, forced_grammar
from ktcore.server.harmony import Harmony
from ktcore.server.thoughts import ThoughtMarks, Thoughts
from ktcore.server.tool_formats import (
    BARE,
    DEEPSEEK,
    DEEPSEEK_V31,
    GLM,
    HERMES,
    KIMI,
    LLAMA3,
    MISTRAL,
    MISTRAL_ARGS,
    QWEN3_CODER,
    ToolFormat,
    format_in,
)

PARIS = ("get_weather", {"city": "Paris"})
OSLO = ("get_weather", {"city": "Oslo", "days": 3})
SCHEMA = {
    "type": "object",
    "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
    "required": ["city"],
}
TOOLS = {"get_weather": SCHEMA, "now": {}}

# Answers as the families' model cards and templates show them.
SAID: list[tuple[ToolFormat, str, str, list[tuple[str, Any]]]] = [
    (
        HERMES,
        '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris"}}\n</tool_call>\n'
        '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Oslo", "days": 3}}\n</tool_call>',
        "",
        [PARIS, OSLO],
    ),
    (HERMES, 'Let me see.\n<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>', "Let me see.", [("now", {})]),
    (
        HERMES,
        '<tool_call>{"arguments": {"city": "}</tool_call>"}, "name": "get_weather"}',
        "",
        [("get_weather", {"city": "}</tool_call>"})],
    ),
    (
        GLM,
        "I look.\n<tool_call>get_weather\n<arg_key>city</arg_key>\n<arg_value>Oslo</arg_value>\n"
        "<arg_key>days</arg_key>\n<arg_value>3</arg_value>\n</tool_call>",
        "I look.",
        [OSLO],
    ),
    (
        QWEN3_CODER,
        "<tool_call>\n<function=get_weather>\n<parameter=city>\nOslo\n</parameter>\n<parameter=days>\n3\n"
        "</parameter>\n</function>\n</tool_call>",
        "",
        [OSLO],
    ),
    (
        DEEPSEEK,
        "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>get_weather\n```json\n"
        '{"city": "Paris"}\n```<｜tool▁call▁end｜>\n<｜tool▁call▁begin｜>function<｜tool▁sep｜>get_weather\n```json\n'
        '{"city": "Oslo", "days": 3}\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜>',
        "",
        [PARIS, OSLO],
    ),
    (
        DEEPSEEK_V31,
        "Sure.<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>get_weather<｜tool▁sep｜>"
        '{"city": "Paris"}<｜tool▁call▁end｜><｜tool▁call▁begin｜>now<｜tool▁sep｜>{}<｜tool▁call▁end｜>'
        "<｜tool▁calls▁end｜>",
        "Sure.",
        [PARIS, ("now", {})],
    ),
    (
        KIMI,
        "<|tool_calls_section_begin|><|tool_call_begin|>functions.get_weather:0<|tool_call_argument_begin|>"
        '{"city": "Paris"}<|tool_call_end|><|tool_call_begin|>functions.now:1<|tool_call_argument_begin|>{}'
        "<|tool_call_end|><|tool_calls_section_end|>",
        "",
        [PARIS, ("now", {})],
    ),
    (
        MISTRAL,
        '[TOOL_CALLS][{"name": "get_weather", "arguments": {"city": "Paris"}, "id": "abcdefghi"}, '
        '{"name": "now", "arguments": {}}]',
        "",
        [PARIS, ("now", {})],
    ),
    (MISTRAL_ARGS, '[TOOL_CALLS]get_weather[ARGS]{"city": "Paris"}[TOOL_CALLS]now[ARGS]{}', "", [PARIS, ("now", {})]),
    (LLAMA3, '{"name": "get_weather", "parameters": {"city": "Paris"}}', "", [PARIS]),
    (
        LLAMA3,
        '<|python_tag|>{"name": "get_weather", "parameters": {"city": "Paris"}}; {"name": "now", "parameters": {}}',
        "",
        [PARIS, ("now", {})],
    ),
    (BARE, '{"name": "get_weather", "arguments": {"city": "Paris"}}', "", [PARIS]),
]


def _read(calls: Calls, pieces: list[str]) -> tuple[str, list[tuple[str, Any]]]:
    text, found = "", []
    for piece in pieces:
        said, more = calls.push(piece)
        text += said
        found += [(call.name, json.loads(call.arguments)) for call in more]
    return text + calls.flush(), found


@pytest.mark.parametrize(
    ("made", "said", "text", "expected"), SAID, ids=[f"{s[0].name}{i}" for i, s in enumerate(SAID)]
)
@pytest.mark.parametrize("size", [1, 7, 10_000])
def test_calls_are_read_as_families_write_them(
    made: ToolFormat, said: str, text: str, expected: list[Any], size: int
) -> None:
    pieces = [said[at : at + size] for at in range(0, len(said), size)]
    assert _read(Calls(made, TOOLS), pieces) == (text, expected)


@pytest.mark.parametrize("made", [HERMES, GLM, QWEN3_CODER, DEEPSEEK, KIMI, MISTRAL, LLAMA3, BARE])
@pytest.mark.parametrize("size", [1, 10_000])
@pytest.mark.parametrize(
    "said", ["Plain, with <b> and [1] and < in it.\n\n- one;\n- two\n", "a {brace} and ```code```"]
)
def test_text_without_calls_stays_as_it_is(made: ToolFormat, said: str, size: int) -> None:
    assert _read(Calls(made, TOOLS), [said[at : at + size] for at in range(0, len(said), size)]) == (said, [])


@pytest.mark.parametrize(
    "broken", ['<tool_call>\n{"name": "get_weather", "argum', "<tool_call>\nnothing\n</tool_call>"]
)
def test_what_began_like_a_call_and_is_none_is_text(broken: str) -> None:
    text, found = _read(Calls(HERMES, TOOLS), list(broken))
    assert found == []
    assert text == broken


def test_kimis_own_ids_are_kept() -> None:
    _, calls = Calls(KIMI, TOOLS).push(SAID[7][1])
    assert [call.id for call in calls] == ["functions.get_weather:0", "functions.now:1"]


# Lines that tell the families' published templates apart.
TEMPLATES = [
    ('{{- \'{"name": <function-name>, "arguments": <args-json-object>}\\n</tool_call>\' }} <tool_call>', HERMES),
    ("<tool_call>{function-name}\\n<arg_key>{arg-key-1}</arg_key>\\n<arg_value>{arg-value-1}</arg_value>", GLM),
    ("<tool_call>\\n<function=example_function_name>\\n<parameter=example_parameter_1>", QWEN3_CODER),
    (
        "{{'<｜tool▁call▁begin｜>' + tool['type'] + '<｜tool▁sep｜>' + tool['function']['name'] + '\\n' + '```json'",
        DEEPSEEK,
    ),
    ("{{'<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>'+ tool['function']['name'] + '<｜tool▁sep｜>'", DEEPSEEK_V31),
    ("<|tool_calls_section_begin|> <|tool_call_begin|>{{ call['id'] }}<|tool_call_argument_begin|>", KIMI),
    ('{{- "[TOOL_CALLS] [" }} {{- tool_call.function|tojson }}', MISTRAL),
    ('{{- "[TOOL_CALLS]" + name + "[ARGS]" + arguments }}', MISTRAL_ARGS),
    ('{{- "<|python_tag|>" + tool_call.name + ".call(" }}', LLAMA3),
    ("{% if tools %}{{ tools | tojson }}{% endif %}", BARE),
    ("{% for m in messages %}{{ m.content }}{% endfor %}", None),
]


@pytest.mark.parametrize(("template", "expected"), TEMPLATES)
def test_the_template_tells_the_format(template: str, expected: ToolFormat | None) -> None:
    assert format_in(template) is expected


FORCED = [HERMES, GLM, QWEN3_CODER, DEEPSEEK, DEEPSEEK_V31, KIMI, MISTRAL, MISTRAL_ARGS, LLAMA3, BARE]


@pytest.mark.parametrize("made", FORCED, ids=lambda made: made.name)
def test_forced_answers_are_calls_that_can_be_read(made: ToolFormat) -> None:
    """Random letters under the grammar, read back by the same format: names and types are right."""
    llguidance = pytest.importorskip("llguidance", reason="needs the extra `server`")
    import random

    tokens = [bytes([i]) for i in range(256)] + [b"<end>"]

    class Bytes:
        eos_token_id, bos_token_id, special_token_ids = 256, None, [256]

        def __init__(self) -> None:
            self.tokens = tokens

        def __call__(self, text: Any) -> list[int]:
            return list(text if isinstance(text, bytes) else text.encode())

    vocabulary = llguidance.LLTokenizer(llguidance.TokenizerWrapper(Bytes()), n_vocab=257)
    grammar = forced_grammar(made, {"get_weather": SCHEMA, "now": {"additionalProperties": False}}, True)
    matcher = llguidance.LLMatcher(vocabulary, grammar)
    assert not matcher.is_error(), matcher.get_error()
    draw = random.Random(3)
    said = bytearray()
    while not matcher.is_stopped() and len(said) < 3000:
        mask = int.from_bytes(matcher.compute_bitmask(), "little")
        allowed = [i for i in range(256) if mask >> i & 1]
        if matcher.is_accepting() and (len(said) > 200 or not allowed):
            break
        # endings are likelier than in random text
        quick = [i for i in allowed if i in b'"}<\n']
        plain = [i for i in allowed if i in b"abc123 "]
        token = draw.choice(quick if quick and draw.random() < 0.7 else plain or allowed)
        assert matcher.consume_token(token)
        said.append(token)
    text, found = _read(Calls(made, TOOLS), [said.decode()])
    assert text.strip() == ""
    assert found
    for name, arguments in found:
        assert name in TOOLS
        if name == "get_weather":
            assert isinstance(arguments["city"], str)
            assert isinstance(arguments.get("days", 0), int)


MARKS = ThoughtMarks("<think>", "</think>")


@pytest.mark.parametrize("size", [1, 5, 10_000])
@pytest.mark.parametrize(
    ("said", "begun", "expected"),
    [
        ("<think>\nHm, <b>?\n</think>\n\nYes.", False, ("Hm, <b>?", "Yes.")),
        ("Hm.\n</think>\n\nYes.\n", True, ("Hm.", "Yes.\n")),
        ("<think>\n\n</think>\n\nYes.", False, ("", "Yes.")),
        (" Yes <think> no.", False, ("", " Yes <think> no.")),
        ("Cut off <", True, ("Cut off <", "")),
        ("<thi", False, ("", "<thi")),
        ("", False, ("", "")),
    ],
)
def test_thoughts_are_told_apart(said: str, begun: bool, expected: tuple[str, str], size: int) -> None:
    thoughts = Thoughts(MARKS, begun)
    pieces = [thoughts.push(said[at : at + size]) for at in range(0, len(said), size)] + [thoughts.flush()]
    assert tuple("".join(part) for part in zip(*pieces, strict=True)) == expected


@pytest.mark.parametrize("size", [1, 10_000])
def test_harmonys_channels_are_told_apart(size: int) -> None:
    said = "<|channel|>analysis<|message|>User asks.<|end|><|start|>assistant<|channel|>final<|message|>Hello!"
    call = (
        "<|channel|>analysis<|message|>Need it.<|end|><|start|>assistant<|channel|>commentary to=functions.get_weather "
        '<|constrain|>json<|message|>{"city": "Paris"}'
    )

    def read(text: str) -> tuple[str, str, list[Any]]:
        harmony = Harmony(True, True)
        parts = [harmony.push(text[at : at + size]) for at in range(0, len(text), size)] + [harmony.flush()]
        calls = [(c.name, json.loads(c.arguments)) for part in parts for c in part[2]]
        return "".join(p[0] for p in parts), "".join(p[1] for p in parts), calls

    assert read(said) == ("Hello!", "User asks.", [])
    assert read(call) == ("", "Need it.", [PARIS])
    assert read("No channels.") == ("No channels.", "", [])
