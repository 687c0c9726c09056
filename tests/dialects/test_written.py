"""Two calls as each family's template writes them, letter by letter: forced answers are these, and are read back."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import pytest

from ktcore.dialects.base import ToolFormat
from ktcore.dialects.dialect import Dialect, Reader, dialect_of, thought_before
from ktcore.dialects.forced import forced_grammar
from ktcore.dialects.harmony import HARMONY
from ktcore.dialects.known import DSML, HERMES, KIMI
from ktcore.dialects.schema import DEPTH, members, types_of, values_of
from ktcore.dialects.thoughts import ThoughtMarks

from .test_forced import taken, vocabulary  # noqa: F401
from .test_pieces import FORMATS

SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"], "additionalProperties": False}
TWO = {
    "hermes": '<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call>\n'
    '<tool_call>\n{"name": "f", "arguments": {"a": 2}}\n</tool_call>',
    "glm": "<tool_call>f\n<arg_key>a</arg_key>\n<arg_value>1</arg_value>\n</tool_call>\n"
    "<tool_call>f\n<arg_key>a</arg_key>\n<arg_value>2</arg_value>\n</tool_call>",
    "qwen3-coder": "<tool_call>\n<function=f>\n<parameter=a>\n1\n</parameter>\n</function>\n</tool_call>\n"
    "<tool_call>\n<function=f>\n<parameter=a>\n2\n</parameter>\n</function>\n</tool_call>",
    "seed": "<seed:tool_call>\n<function=f>\n<parameter=a>1</parameter>\n</function>\n</seed:tool_call>\n"
    "<seed:tool_call>\n<function=f>\n<parameter=a>2</parameter>\n</function>\n</seed:tool_call>",
    "invoke": '<minimax:tool_call>\n<invoke name="f">\n<parameter name="a">1</parameter>\n</invoke>\n'
    '<invoke name="f">\n<parameter name="a">2</parameter>\n</invoke>\n</minimax:tool_call>',
    "dsml": '<｜DSML｜function_calls>\n<｜DSML｜invoke name="f">\n'
    '<｜DSML｜parameter name="a" string="false">1</｜DSML｜parameter>\n</｜DSML｜invoke>\n<｜DSML｜invoke name="f">\n'
    '<｜DSML｜parameter name="a" string="false">2</｜DSML｜parameter>\n</｜DSML｜invoke>\n</｜DSML｜function_calls>',
    "deepseek": '<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>f\n```json\n{"a": 1}\n```'
    '<｜tool▁call▁end｜>\n<｜tool▁call▁begin｜>function<｜tool▁sep｜>f\n```json\n{"a": 2}\n```<｜tool▁call▁end｜>'
    "<｜tool▁calls▁end｜>",
    "deepseek-v3.1": '<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>f<｜tool▁sep｜>{"a": 1}<｜tool▁call▁end｜>'
    '<｜tool▁call▁begin｜>f<｜tool▁sep｜>{"a": 2}<｜tool▁call▁end｜><｜tool▁calls▁end｜>',
    "mistral": '[TOOL_CALLS][{"name": "f", "arguments": {"a": 1}}, {"name": "f", "arguments": {"a": 2}}]',
    "mistral-args": '[TOOL_CALLS]f[ARGS]{"a": 1}[TOOL_CALLS]f[ARGS]{"a": 2}',
    "listed": '<tool_calls>[{"name": "f", "arguments": {"a": 1}}, {"name": "f", "arguments": {"a": 2}}]</tool_calls>',
    "toolcall": '<TOOLCALL>[{"name": "f", "arguments": {"a": 1}}, {"name": "f", "arguments": {"a": 2}}]</TOOLCALL>',
    "action": '<|START_ACTION|>[{"tool_call_id": "0", "tool_name": "f", "parameters": {"a": 1}}, '
    '{"tool_call_id": "0", "tool_name": "f", "parameters": {"a": 2}}]<|END_ACTION|>',
}
ONE = {
    "kimi-k2": "<|tool_calls_section_begin|><|tool_call_begin|>functions.f:0<|tool_call_argument_begin|>"
    '{"a": 1}<|tool_call_end|><|tool_calls_section_end|>',
    "bare": '{"name": "f", "arguments": {"a": 1}}',
    "llama-3": '{"name": "f", "parameters": {"a": 1}}',
    "harmony": '<|channel|>commentary to=functions.f <|constrain|>json<|message|>{"a": 1}',
}
EVERY = [*FORMATS, HARMONY]


class _Letters:
    """A tokenizer of letters, but for marks that are control tokens."""

    def __init__(self, *control: str) -> None:
        self.control = control

    def encode(self, text: str) -> list[int]:
        ids: list[int] = []
        while text:
            mark = next((mark for mark in self.control if text.startswith(mark)), None)
            ids.append(ord(text[0]) if mark is None else -1 - self.control.index(mark))
            text = text[len(mark or text[0]) :]
        return ids

    def decode(self, ids: list[int], skip_special: bool = True) -> str:
        control = dict(enumerate(self.control))
        return "".join(chr(i) if i >= 0 else "" if skip_special else control[-1 - i] for i in ids)

    def token_id(self, word: str) -> int | None:
        return -1 - self.control.index(word) if word in self.control else None

    def is_control(self, token: int) -> bool:
        return token < 0


def _read(dialect: Dialect, tokenizer: Any, prompt: str, said: str, **more: Any) -> tuple[str, str, list[Any]]:
    given: dict[str, Any] = {"separate": True, "tools": {"f": SCHEMA}, **more}
    reader = Reader(dialect, tokenizer, tokenizer.encode(prompt), **given)
    parts = [*map(reader.push, said), reader.end()]
    calls = [(call.name, json.loads(call.arguments)) for part in parts for call in part.calls]
    return "".join(p.content for p in parts), "".join(p.reasoning for p in parts), calls


@pytest.mark.parametrize("made", EVERY, ids=lambda made: made.name)
def test_forced_answers_are_as_templates_write_them_and_are_read_back(
    made: ToolFormat,
    vocabulary: Any,  # noqa: F811
) -> None:
    grammar = forced_grammar(made, {"f": SCHEMA}, True)
    single = forced_grammar(made, {"f": SCHEMA}, False)
    dialect = Dialect(None, made, made is HARMONY)
    if made.name in ONE:
        assert taken(vocabulary, grammar, ONE[made.name])
        assert not taken(vocabulary, grammar, ONE[made.name] * 2)
        assert _read(dialect, _Letters(), "", ONE[made.name]) == ("", "", [("f", {"a": 1})])
        return
    whole = TWO[made.name]
    assert taken(vocabulary, grammar, whole)
    assert not taken(vocabulary, single, whole)
    assert not taken(vocabulary, grammar, whole[:-1])
    both = [("f", {"a": 1}), ("f", {"a": 2})]
    assert _read(dialect, _Letters(), "", whole) == ("", "", both)
    assert _read(dialect, _Letters(), "", "First.\n\n" + whole + "\n") == ("First.", "", both)
    assert _read(dialect, _Letters(), "", whole, several=False)[2] == both[:1]
    assert _read(dialect, _Letters(), "", whole, tools={}) == (whole, "", [])


def test_only_these_families_are_known_to_call_within_open_thoughts() -> None:
    known = {"glm", "invoke", "dsml", "seed", "qwen3-coder", "kimi-k2"}
    assert {made.name for made in EVERY if made.ends_thoughts} == known
    thinks = Dialect(ThoughtMarks("<think>", "</think>"), HERMES)
    call = TWO["hermes"].split("\n<tool_call>")[0]
    assert _read(thinks, _Letters(), "<think>", f"I could say {call}.</think>Yes.") == (
        "Yes.",
        f"I could say {call}.",
        [],
    )
    kimi = Dialect(ThoughtMarks("<think>", "</think>"), KIMI)
    assert _read(kimi, _Letters(), "<think>", "Hm. " + ONE["kimi-k2"]) == ("", "Hm.", [("f", {"a": 1})])


@pytest.mark.parametrize("marks", [("<think>", "</think>"), ("[THINK]", "[/THINK]")])
@pytest.mark.parametrize("control", [True, False])
def test_a_prompt_may_have_opened_or_closed_the_thoughts_by_words_or_control_tokens(
    marks: tuple[str, str], control: bool
) -> None:
    begin, end = marks
    dialect, letters = Dialect(ThoughtMarks(begin, end), HERMES), _Letters(*(marks if control else ()))
    for prompt in (begin, f"Say.{begin}", f"{begin}\n", f"x{begin}\n\n "):
        assert _read(dialect, letters, prompt, f"Hm.{end}Yes.") == ("Yes.", "Hm.", [])
        thought = thought_before(dialect, letters, letters.encode(prompt))  # type: ignore[arg-type]
        assert thought is not None
        assert (thought.begin, thought.end, thought.begun) == (begin, end, True)
    for prompt in ("Say.", f"{begin}x{end} Say."):
        assert _read(dialect, letters, prompt, "Yes.") == ("Yes.", "", [])
        thought = thought_before(dialect, letters, letters.encode(prompt))  # type: ignore[arg-type]
        assert thought is not None
        assert not thought.begun
    for prompt in (f"{begin}{end}", f"Say.{begin}x{end}\n\n"):
        assert thought_before(dialect, letters, letters.encode(prompt)) is None  # type: ignore[arg-type]
    assert dialect.thinks
    assert not Dialect(None, HERMES).thinks


def test_harmonys_thoughts_are_opened_by_the_model_and_leave_a_way_to_the_answer() -> None:
    dialect = dialect_of("{% set x = '<|channel|>analysis' %}")
    assert dialect == Dialect(None, HARMONY, True)
    assert dialect.thinks
    thought = thought_before(dialect, _Letters(), [])  # type: ignore[arg-type]
    assert thought is not None
    assert (thought.begin, thought.begun) == ("<|channel|>analysis<|message|>", False)
    assert thought.end == "<|end|><|start|>assistant"
    said = thought.begin + "Hm." + thought.end + "<|channel|>final<|message|>Yes."
    assert _read(dialect, _Letters(), "", said) == ("Yes.", "Hm.", [])
    assert _read(dialect, _Letters(), "", said, separate=False) == ("Hm.Yes.", "", [])


def test_control_tokens_of_calls_and_thoughts_are_shown_and_others_are_not() -> None:
    dialect = Dialect(ThoughtMarks("<think>", "</think>"), DSML)
    letters = _Letters("<think>", "<|other|>", "[ARGS]", *DSML.marks, *DSML.ends)
    shown = dialect.shown(letters)  # type: ignore[arg-type]
    assert shown == {letters.token_id(mark) for mark in letters.control if mark != "<|other|>"}
    plain = SimpleNamespace(token_id=letters.token_id, is_control=lambda token: False)
    assert dialect.shown(plain) == frozenset()  # type: ignore[arg-type]


def test_dsmls_own_word_decides_before_the_schema() -> None:
    text = TWO["dsml"]
    strings = {"f": {"type": "object", "properties": {"a": {"type": "string"}}}}
    dialect = Dialect(None, DSML)
    # not a string, says the model, though the schema has one; and a string, though the schema has a number
    assert _read(dialect, _Letters(), "", text, tools=strings)[2] == [("f", {"a": 1}), ("f", {"a": 2})]
    told = text.replace('string="false"', 'string="true"')
    assert _read(dialect, _Letters(), "", told)[2] == [("f", {"a": "1"}), ("f", {"a": "2"})]
    # what is no JSON is text anyway; where the model says nothing, the schema decides
    odd = text.replace(">1<", ">one<").replace(">2<", ">NaN<")
    assert _read(dialect, _Letters(), "", odd)[2] == [("f", {"a": "one"}), ("f", {"a": "NaN"})]
    silent = text.replace(' string="false"', "")
    assert _read(dialect, _Letters(), "", silent, tools=strings)[2] == [("f", {"a": "1"}), ("f", {"a": "2"})]


def test_listed_values_bound_the_types() -> None:
    assert types_of({"type": ["string", "integer"], "enum": [1, 2]}, {}) == {"integer"}
    assert types_of({"enum": ["a", None, 1.5, 2.0, True, [], {}]}, {}) == {
        *("string", "null", "number", "integer", "boolean", "array", "object")
    }
    assert types_of({"const": "x", "type": "integer"}, {}) == frozenset()


def test_schemas_that_refer_to_themselves_end() -> None:
    root: dict[str, Any] = {"$defs": {"a": {}}}
    root["$defs"]["a"] = {
        "properties": {"x": {"type": "string"}},
        "anyOf": [{"$ref": "#/$defs/a"}],
        "allOf": [{"$ref": "#/$defs/a"}],
    }
    for word in ("$ref", "anyOf", "oneOf", "allOf"):
        whole: dict[str, Any] = {**root, word: "#/$defs/a" if word == "$ref" else [{"$ref": "#/$defs/b"}]}
        whole["$defs"] = {"b": {word: whole[word], "properties": {"x": {"type": "string"}}}}
        if word == "$ref":
            whole["$defs"]["a"] = {"$ref": "#/$defs/a", "properties": {"x": {"type": "string"}}}
        found, needed = members(whole, whole)
        assert "x" in found
        assert needed == frozenset()
        assert types_of(whole, whole)
        assert values_of(whole, whole) is None


def test_schemas_are_followed_to_a_depth_and_no_further() -> None:
    def nested(levels: int) -> dict[str, Any]:
        made: dict[str, Any] = {"type": "string", "properties": {"x": {}}, "required": ["x"], "enum": ["a"]}
        for level in range(levels):
            made = {("allOf", "anyOf")[level % 2]: [made]}
        return made

    for levels, inside in ((DEPTH, True), (DEPTH + 1, False)):
        schema = nested(levels)
        assert (types_of(schema, schema) == {"string"}) is inside
        assert ("x" in members(schema, schema)[0]) is inside
        assert (members(schema, schema)[1] == {"x"}) is inside
        assert (values_of(schema, schema) == ["a"]) is inside
