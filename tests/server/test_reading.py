"""Answers taken apart: thoughts, text and calls, as model families write them, whole and letter by letter."""

from __future__ import annotations

import itertools
import json
import os
import re
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("fastapi", reason="needs the extra `server`")

from ktcore.dialects.bare import BARE
from ktcore.dialects.base import ToolFormat
from ktcore.dialects.calls import Calls
from ktcore.dialects.dialect import dialect_of
from ktcore.dialects.earlier_calls import earlier_calls
from ktcore.dialects.forced import forced_grammar
from ktcore.dialects.harmony import Harmony
from ktcore.dialects.invoke import DSML, INVOKE
from ktcore.dialects.known import (
    ACTION,
    DEEPSEEK,
    DEEPSEEK_V31,
    GLM,
    HERMES,
    KIMI,
    LISTED,
    LLAMA3,
    MISTRAL,
    MISTRAL_ARGS,
    QWEN3_CODER,
    SEED,
    TOOLCALL,
    format_in,
)
from ktcore.dialects.thoughts import ThoughtMarks, Thoughts
from ktcore.text.chat_template import render

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
    (
        HERMES,
        '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>\n\nAnd some more text, with < in it. ',
        "And some more text, with < in it. ",
        [("now", {})],
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
    (
        SEED,
        "<seed:tool_call>\n<function=get_weather>\n<parameter=city>Paris</parameter>\n</function>\n</seed:tool_call>",
        "",
        [PARIS],
    ),
    (
        INVOKE,
        '<minimax:tool_call>\n<invoke name="get_weather">\n<parameter name="city">Oslo</parameter>\n'
        '<parameter name="days">3</parameter>\n</invoke>\n<invoke name="now">\n</invoke>\n</minimax:tool_call>',
        "",
        [OSLO, ("now", {})],
    ),
    (
        DSML,
        'Yes.\n\n<｜DSML｜function_calls>\n<｜DSML｜invoke name="get_weather">\n'
        '<｜DSML｜parameter name="city" string="true">Oslo</｜DSML｜parameter>\n'
        '<｜DSML｜parameter name="days" string="false">3</｜DSML｜parameter>\n'
        "</｜DSML｜invoke>\n</｜DSML｜function_calls>",
        "Yes.",
        [OSLO],
    ),
    (LISTED, '<tool_calls>[{"name": "get_weather", "arguments": {"city": "Paris"}}]</tool_calls>', "", [PARIS]),
    (
        LISTED,
        '<tool_calls>\n{"name": "get_weather", "arguments": {"city": "Paris"}}\n{"name": "now", "arguments": {}}\n'
        "</tool_calls>",
        "",
        [PARIS, ("now", {})],
    ),
    (TOOLCALL, '<TOOLCALL>[{"name": "get_weather", "arguments": {"city": "Paris"}}]</TOOLCALL>', "", [PARIS]),
    (
        ACTION,
        '<|START_ACTION|>[\n    {"tool_call_id": "0", "tool_name": "get_weather", "parameters": {"city": "Paris"}}\n]'
        "<|END_ACTION|>",
        "",
        [PARIS],
    ),
    (BARE, '{"name": "get_weather", "arguments": {"city": "Paris"}}', "", [PARIS]),
]


def _read(calls: Calls, pieces: list[str]) -> tuple[str, list[tuple[str, Any]]]:
    text, found = "", []
    for piece in pieces:
        said, more = calls.push(piece)
        text += said
        found += [(call.name, json.loads(call.arguments)) for call in more]
    rest, late = calls.flush()
    return text + rest, found + [(call.name, json.loads(call.arguments)) for call in late]


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
    _, calls = Calls(KIMI, TOOLS).push(next(said for made, said, *_ in SAID if made is KIMI))
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
FORCED += [INVOKE, DSML, LISTED, TOOLCALL, ACTION]


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
        ends = made.pairs.closes.encode() if made.pairs is not None else b""
        if ends and draw.random() < 0.2 and matcher.deep_copy().try_consume_tokens([*ends]) == len(ends):
            # free text goes on until its end mark is written whole
            assert matcher.try_consume_tokens([*ends]) == len(ends)
            said += ends
            continue
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
    # gpt-oss may name the function before the channel, where the prompt has opened the message
    first = ' to=functions.get_weather<|channel|>commentary json<|message|>{"city": "Paris"}<|call|>'
    assert read(first) == ("", "", [PARIS])
    assert read(" to=functions is text") == (" to=functions is text", "", [])
    assert read("No channels.") == ("No channels.", "", [])


LIKE_R1 = (
    "{% for m in messages %}{% if m['role'] == 'assistant' and m['content'] is none %}"
    "{% for c in m['tool_calls'] %}{{ c['function']['name'] + c['function']['arguments'] }}{% endfor %}"
    "{% elif m['role'] == 'assistant' %}{{ m['content'] }}{% endif %}{% endfor %}"
)
LIKE_QWEN = (
    "{% for m in messages %}{% if '</think>' in m.content %}{% endif %}{% for c in m.tool_calls or [] %}"
    "{{ c.function.name }}{{ c.function.arguments | tojson }}{% endfor %}{% endfor %}"
)


@pytest.mark.parametrize(
    ("source", "content", "arguments"),
    [(LIKE_R1, None, '{"city": "Paris"}'), (LIKE_QWEN, "", {"city": "Paris"}), (LIKE_QWEN, "Hm.", {"city": "Paris"})],
)
def test_earlier_calls_are_given_as_the_template_shows_them(source: str, content: str | None, arguments: Any) -> None:
    call = {"type": "function", "function": {"name": "get_weather", "arguments": '{"city": "Paris"}'}}
    messages = [{"role": "user", "content": "?"}, {"role": "assistant", "content": content, "tool_calls": [call]}]
    (_, made) = earlier_calls(source, messages, {})
    assert made["content"] == content
    assert made["tool_calls"][0]["function"]["arguments"] == arguments
    text = render(source, [messages[0], made], {}, "")
    assert "get_weather" in text
    assert "\\" not in text


LIKE_GLM = (
    "{% for m in messages %}{{ m.content }}{% for c in m.tool_calls or [] %}{{ c.function.name }}"
    "{% for k, v in c.function.arguments.items() %}{{ k }}={{ v | tojson if v is not string else v }}{% endfor %}"
    "{% endfor %}{% endfor %}"
)
OBJECTS_ALONE = (
    "{% for m in messages %}{{ m.content }}{% for c in m.tool_calls or [] %}{{ c.function.name }}"
    "{% if c.function.arguments is mapping %}{{ c.function.arguments | tojson }}{% endif %}{% endfor %}{% endfor %}"
)


@pytest.mark.parametrize("source", [LIKE_R1, LIKE_QWEN, LIKE_GLM, OBJECTS_ALONE])
@pytest.mark.parametrize("arguments", ['{"city" Oslo', "[12345]", "34567", "words"])
def test_arguments_that_are_no_object_are_shown_as_they_are(arguments: str, source: str) -> None:
    call = {"type": "function", "function": {"name": "f", "arguments": arguments}}
    made = earlier_calls(source, [{"role": "assistant", "content": "", "tool_calls": [call]}], {})
    assert arguments in render(source, made, {}, "").replace("\\", "")


FOLDER = os.environ.get("KTCORE_CHAT_TEMPLATES", "")
# Their own ways of writing calls are not known here, or they show none.
UNKNOWN = (
    *("Apertus", "GigaChat", "Kimi-K3", "Kimi-K2-Instruct", "Kimi-K2-Thinking", "LFM2", "MiniMax-M3", "SmolLM3"),
    *("c4ai-command-r-plus", "firefunction", "gemma", "granite-3.3", "llama-cpp-", "functionary", "Phi-3.5"),
    *("muse-", "MiniCPM5", "tencent-Hy3", "Solar-Open"),
)


@pytest.mark.skipif(not FOLDER, reason="KTCORE_CHAT_TEMPLATES names a folder of templates, such as llama.cpp's")
@pytest.mark.parametrize("path", sorted(Path(FOLDER).glob("*.jinja")) if FOLDER else [], ids=lambda path: path.stem)
def test_what_published_templates_write_is_read_back(path: Path) -> None:
    """The assistant's turn as the template shows it is what the model was trained to write."""
    if any(name in path.stem for name in UNKNOWN):
        pytest.skip("writes calls in a way that is not known")
    source = path.read_text()
    dialect = dialect_of(source)
    assert dialect.tools is not None
    tools = [{"type": "function", "function": {"name": "get_weather", "description": "Weather", "parameters": SCHEMA}}]
    call = {"id": "abcdefghi", "type": "function", "function": {"name": OSLO[0], "arguments": json.dumps(OSLO[1])}}
    names = {"bos_token": "<BOS>", "eos_token": "<EOS>", "unk_token": "<UNK>"}
    messages = earlier_calls(
        source,
        [
            {"role": "user", "content": "Weather?"},
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "tool_call_id": "abcdefghi", "name": OSLO[0], "content": "sunny"},
        ],
        names,
    )
    variables = {**names, "tools": tools, "documents": None, "add_generation_prompt": False}
    asked = render(source, messages[:1], {**variables, "add_generation_prompt": True}, "")
    told = render(source, messages, variables, "")
    assert "sunny" in told
    said = render(source, messages[:2], variables, "")
    same = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(asked, said, strict=False)))
    # a mark that both begin is not cut in two
    cut = re.search(r"[<\[][^>\]]*$", said[:same])
    said = said[cut.start() if cut else same :]
    if dialect.harmony:
        *_, first = Harmony(True, True).push(said)
        assert [(c.name, json.loads(c.arguments)) for c in first] == [OSLO]
        return
    _, found = _read(Calls(dialect.tools, TOOLS), list(said))
    assert found == [OSLO]
