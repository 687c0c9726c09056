"""What arguments written as text are, by the schema: against JSON Schema's own validator where one is at hand."""

from __future__ import annotations

from typing import Any

import pytest

from ktcore.dialects.pairs import value_of
from ktcore.dialects.reading import More, json_object
from ktcore.dialects.schema import argument_of, members, rooted, types_of, values_of

ROOT: dict[str, Any] = {
    "type": "object",
    "properties": {
        "zip": {"anyOf": [{"type": "string"}, {"type": "null"}]},
        "code": {"$ref": "#/$defs/Code"},
        "old": {"$ref": "#/definitions/a~1b"},
        "color": {"enum": ["1", "red"]},
        "fixed": {"const": "7"},
        "both": {"allOf": [{"type": ["string", "integer"]}, {"type": ["string", "null"]}]},
        "count": {"type": "integer"},
        "flag": {"type": ["boolean", "null"]},
        "either": {"type": ["string", "integer"]},
        "mixed": {"enum": ["5", 7, None]},
        "list": {"anyOf": [{"type": "array", "items": {"type": "string"}}, {"type": "string"}]},
        "self": {"$ref": "#/properties/self"},
    },
    "required": ["zip"],
    "$defs": {"Code": {"type": "string"}},
    "definitions": {"a/b": {"oneOf": [{"$ref": "#/$defs/Code"}, {"type": "null"}]}},
}


@pytest.mark.parametrize(
    ("key", "text", "expected"),
    [
        ("zip", "90210", "90210"),
        ("zip", "true", "true"),
        ("zip", "null", None),
        ("zip", '"quoted"', '"quoted"'),
        ("code", "1e5", "1e5"),
        ("old", "12", "12"),
        ("old", "null", None),
        ("color", "1", "1"),
        ("fixed", "7", "7"),
        ("both", "3", "3"),
        ("both", "null", "null"),
        ("count", " 3\n", 3),
        ("count", "three", "three"),
        ("count", "NaN", "NaN"),
        ("flag", "true", True),
        ("flag", "True", True),
        ("flag", "None", None),
        ("either", "5", 5),
        ("either", "05", "05"),
        ("either", "True", "True"),
        ("mixed", "5", "5"),
        ("mixed", "7", 7),
        ("mixed", "null", None),
        ("list", '["a"]', ["a"]),
        ("list", "3", "3"),
        ("self", "3", 3),
        ("unknown", "3", 3),
        ("unknown", "words", "words"),
    ],
)
def test_text_is_what_the_schema_says(key: str, text: str, expected: Any) -> None:
    found = value_of(text, argument_of(ROOT, key), ROOT)
    assert found == expected
    assert type(found) is type(expected)


@pytest.mark.parametrize(("nullable", "expected"), [(True, None), (False, "null"), (None, "null")])
def test_openapis_nullable_makes_null_of_the_word(nullable: bool | None, expected: str | None) -> None:
    schema = {"type": "string", "nullable": nullable}
    assert value_of("null", schema, schema) == expected
    assert value_of("3", schema, schema) == "3"


def test_properties_behind_references_and_parts_are_found() -> None:
    schema = {
        "$ref": "#/$defs/Base",
        "allOf": [{"properties": {"b": {"type": "integer"}}, "required": ["b"]}],
        "$defs": {"Base": {"properties": {"a": {"type": "string"}}, "required": ["a"]}},
    }
    found, needed = members(schema, schema)
    assert (list(found), needed) == (["a", "b"], {"a", "b"})
    assert value_of("5", argument_of(schema, "a"), schema) == "5"


def test_types_are_those_that_a_validator_takes() -> None:
    rs = pytest.importorskip("jsonschema_rs", reason="the judge")
    samples = {"string": "5", "null": None, "boolean": True, "integer": 3, "number": 2.5, "array": [], "object": {}}
    for key, schema in ROOT["properties"].items():
        if key == "self":
            continue
        alone = rs.validator_for(rooted(schema, ROOT))
        listed = values_of(schema, ROOT)
        if listed is not None:
            assert all(alone.is_valid(value) for value in listed)
            continue
        assert {kind for kind, value in samples.items() if alone.is_valid(value)} == types_of(schema, ROOT)


def test_json_that_is_cut_off_may_go_on_and_what_is_broken_may_not() -> None:
    whole = '{"a\\u00e9\\n": [1, -2.5e+3, true, false, null, "x\\\\"], "b": {"c": {}}, "d": "\\ud83d\\ude00"} and on'
    end = whole.rindex("}") + 1
    for at in range(end):
        assert isinstance(json_object(whole[:at], 0), More), whole[:at]
    found = json_object(whole, 0)
    assert isinstance(found, tuple)
    assert found[1] == end
    started = ('{"a" 1', "{a", '{"a": 01', '{"a": tru3', '{"a": 1.x', '{"a": NaN', '{"a": 1e999}', '{"\\u00g', "[1]")
    for broken in started:
        assert json_object(broken, 0) is None, broken


def test_references_below_properties_with_the_names_of_words_lead_into_the_whole() -> None:
    kind = {"type": "object", "properties": {"enum": {"$ref": "#/$defs/x"}, "$ref": {"const": {"$ref": "#/$defs/x"}}}}
    found = rooted(kind, {"$defs": {"x": {"type": "string"}}})["allOf"][0]["properties"]
    assert found == {"enum": {"$ref": "#/$defs/whole/$defs/x"}, "$ref": {"const": {"$ref": "#/$defs/x"}}}
