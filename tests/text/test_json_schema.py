"""Words of a JSON schema that constrain nothing are left out before the guide's library sees them."""

from __future__ import annotations

import json

import pytest

from ktcore.text.json_schema import FORMATS, without_idle_words


def test_what_constrains_nothing_goes_at_any_depth() -> None:
    inner = {"type": "string", "format": "binary"}
    given = {"type": "array", "uniqueItems": False, "items": {"anyOf": [inner, {"$ref": "#/$defs/x"}]}}
    assert without_idle_words({**given, "$defs": {"x": inner}}) == {
        "type": "array",
        "items": {"anyOf": [{"type": "string"}, {"$ref": "#/$defs/x"}]},
        "$defs": {"x": {"type": "string"}},
    }


def test_what_constrains_stays() -> None:
    given = {"type": "array", "uniqueItems": True, "items": {"type": "string", "format": "date"}}
    assert without_idle_words(given) == given


def test_names_of_properties_and_values_stay() -> None:
    given = {
        "type": "object",
        "properties": {"format": {"type": "string"}, "uniqueItems": {"const": {"format": "binary"}}},
        "enum": [{"format": "binary", "uniqueItems": False}],
    }
    assert without_idle_words(given) == given


@pytest.mark.parametrize("name", sorted(FORMATS))
def test_the_library_knows_every_format_that_stays(name: str) -> None:
    llguidance = pytest.importorskip("llguidance")
    body = {"grammars": [{"json_schema": {"type": "string", "format": name}}]}
    assert not llguidance.LLMatcher.validate_grammar(json.dumps(body))
