"""Forced answers in every family's way, with schemas that refer: what the grammar takes, the reader reads back."""

from __future__ import annotations

import json
from typing import Any

import pytest

from ktcore.dialects.base import ToolFormat
from ktcore.dialects.forced import beside_grammar, forced_grammar

from .test_pieces import FORMATS, read, written

llguidance = pytest.importorskip("llguidance", reason="needs the extra `server`")

SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "city": {"$ref": "#/$defs/City"},
        "note": {"anyOf": [{"$ref": "#/definitions/Note"}, {"type": "null"}]},
        "days": {"$ref": "#/$defs/Days"},
        "kind": {"$ref": "#/$defs/Kind"},
        "path": {"$ref": "#/$defs/Path"},
    },
    "required": ["city", "note", "days", "kind"],
    "additionalProperties": False,
    "$defs": {
        "City": {"type": "string", "minLength": 2, "maxLength": 6},
        "Days": {"type": "integer", "maximum": 9},
        "Kind": {"enum": ["a", "b/c", None]},
        "Path": {"type": "array", "items": {"$ref": "#/$defs/Days"}},
    },
    "definitions": {"Note": {"type": "string"}},
}
RIGHT: dict[str, Any] = {"city": "Oslo", "note": "\n x <b> \n", "days": 3, "kind": "b/c", "path": [1, 2]}
WRONG: list[dict[str, Any]] = [{"days": 10}, {"days": "many"}, {"kind": "c"}, {"path": ["x"]}, {"city": "Reykjavik"}]


@pytest.fixture(scope="module")
def vocabulary() -> Any:
    class Bytes:
        eos_token_id, bos_token_id, special_token_ids = 256, None, [256]
        tokens = [bytes([i]) for i in range(256)] + [b"<end>"]

        def __call__(self, text: Any) -> list[int]:
            return list(text if isinstance(text, bytes) else text.encode())

    return llguidance.LLTokenizer(llguidance.TokenizerWrapper(Bytes()), n_vocab=257)


def taken(vocabulary: Any, grammar: str, text: str) -> bool:
    matcher = llguidance.LLMatcher(vocabulary, grammar, log_level=0)
    assert not matcher.is_error(), matcher.get_error()
    size = len(text.encode())
    return bool(matcher.try_consume_tokens([*text.encode()]) == size and matcher.is_accepting())


@pytest.mark.parametrize("made", FORMATS, ids=lambda made: made.name)
def test_references_are_followed_and_what_is_written_is_read_back(made: ToolFormat, vocabulary: Any) -> None:
    grammar = forced_grammar(made, {"get_weather": SCHEMA}, False)
    whole = written(made, arguments=RIGHT)
    assert taken(vocabulary, grammar, whole)
    for wrong in WRONG:
        assert not taken(vocabulary, grammar, written(made, arguments={**RIGHT, **wrong})), wrong
    for key in RIGHT:
        rest = {k: v for k, v in RIGHT.items() if k != key}
        assert taken(vocabulary, grammar, written(made, arguments=rest)) == (key not in SCHEMA["required"]), key
    if made.name == "harmony":
        return
    from ktcore.dialects.calls import Calls

    said, calls = Calls(made, {"get_weather": SCHEMA}).push(whole)
    assert said == ""
    assert json.loads(calls[0].arguments) == RIGHT
    assert read(made, whole)[1][0][0] == "get_weather"


@pytest.mark.parametrize("made", FORMATS, ids=lambda made: made.name)
def test_calls_may_stand_in_place_of_a_form_that_begins_with_a_brace(made: ToolFormat, vocabulary: Any) -> None:
    form = {"type": "object", "properties": {"time": {"type": "string"}}, "required": ["time"]}
    calls = beside_grammar(made, {"get_weather": SCHEMA}, False)
    parts: list[dict[str, Any]] = [{"lark_grammar": "start: @body | @calls"}, {"name": "body", "json_schema": form}]
    grammar = json.dumps({"grammars": [*parts, {"name": "calls", "lark_grammar": calls}]})
    assert taken(vocabulary, grammar, '{"time": "now"}')
    call = written(made, arguments=RIGHT)
    assert taken(vocabulary, grammar, call)
    assert not taken(vocabulary, grammar, call.removesuffix("}") + ', "more": 1}')
    assert not taken(vocabulary, grammar, "words")


@pytest.mark.parametrize("made", [made for made in FORMATS if made.pairs], ids=lambda made: made.name)
@pytest.mark.parametrize(
    ("limits", "fine", "wrong"),
    [
        ({}, ["", "x", "\n\n"], []),
        ({"minLength": 2}, ["xy", "long enough"], ["", "x"]),
        ({"maxLength": 2}, ["", "xy"], ["xyz"]),
        ({"allOf": [{"minLength": 1}, {"minLength": 2, "maxLength": 3}], "maxLength": 9}, ["xy", "xyz"], ["x", "wxyz"]),
    ],
)
def test_text_is_as_long_as_the_schema_says_and_empty_where_it_says_nothing(
    made: ToolFormat, limits: dict[str, Any], fine: list[str], wrong: list[str], vocabulary: Any
) -> None:
    schema = {"type": "object", "properties": {"city": {"type": "string", **limits}}, "required": ["city"]}
    grammar = forced_grammar(made, {"get_weather": schema}, False)
    assert all(taken(vocabulary, grammar, written(made, arguments={"city": text})) for text in fine)
    assert not any(taken(vocabulary, grammar, written(made, arguments={"city": text})) for text in wrong)


def test_a_pattern_binds_text_that_stands_without_quotes(vocabulary: Any) -> None:
    from ktcore.dialects.glm import GLM

    schema = {"type": "object", "properties": {"city": {"type": "string", "pattern": "^a/[0-9]+$"}}}
    grammar = forced_grammar(GLM, {"get_weather": schema}, False)
    assert taken(vocabulary, grammar, written(GLM, arguments={"city": "a/12"}))
    assert not taken(vocabulary, grammar, written(GLM, arguments={"city": "b/12"}))
