"""JSON schemas as the guide's library takes them: without words that constrain nothing, which it would refuse."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

FORMATS = frozenset(
    ("date-time", "time", "date", "duration", "email", "hostname", "ipv4", "ipv6", "uuid", "uri", "unknown")
)
"""Those that llguidance 1.9 holds strings to."""
_BY_NAME = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")
_VALUES = ("const", "enum", "default", "examples", "example")


def without_idle_words(schema: Any) -> Any:
    """A copy without `uniqueItems: false` (the default) and formats that nobody holds strings to.

    JSON Schema 2020-12, validation, section 7.2.3: an unknown format is no reason to cease processing. Names of
    properties and values are left alone, whatever they are.
    """
    if isinstance(schema, list):
        return [without_idle_words(item) for item in schema]
    if not isinstance(schema, Mapping):
        return schema
    kept = {}
    for key, value in schema.items():
        if key == "uniqueItems" and value is False:
            continue
        if key == "format" and isinstance(value, str) and value not in FORMATS:
            continue
        if key in _BY_NAME and isinstance(value, Mapping):
            kept[key] = {name: without_idle_words(inner) for name, inner in value.items()}
        else:
            kept[key] = value if key in _VALUES else without_idle_words(value)
    return kept
