"""JSON schemas as the guide's library takes them: without words that constrain nothing, which it would refuse."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

FORMATS = frozenset(
    ("date-time", "time", "date", "duration", "email", "hostname", "ipv4", "ipv6", "uuid", "uri", "unknown")
)
"""Those that llguidance 1.9 holds strings to."""
LEFT_OUT = object()
"""What an edit gives for a word that goes."""
_BY_NAME = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")
_VALUES = ("const", "enum", "default", "examples", "example")


def without_idle_words(schema: Any) -> Any:
    """A copy without `uniqueItems: false` (the default) and formats that nobody holds strings to.

    JSON Schema 2020-12, validation, section 7.2.3: an unknown format is no reason to cease processing.
    """
    return rewritten(schema, _idle)


def rewritten(schema: Any, edit: Callable[[str, Any], Any]) -> Any:
    """A copy in which `edit` had its say over each word, at any depth; names of properties and values are left alone.

    Args:
        edit: (word, value) -> value, or :data:`LEFT_OUT`.
    """
    if isinstance(schema, list):
        return [rewritten(item, edit) for item in schema]
    if not isinstance(schema, Mapping):
        return schema
    kept = {}
    for word, given in schema.items():
        value = edit(word, given)
        if value is LEFT_OUT:
            continue
        if word in _BY_NAME and isinstance(value, Mapping):
            kept[word] = {name: rewritten(inner, edit) for name, inner in value.items()}
        else:
            kept[word] = value if word in _VALUES else rewritten(value, edit)
    return kept


def _idle(word: str, value: Any) -> Any:
    if word == "uniqueItems" and value is False:
        return LEFT_OUT
    unknown = word == "format" and isinstance(value, str) and value not in FORMATS
    return LEFT_OUT if unknown else value
