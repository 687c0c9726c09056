"""What is wrong with a request, from pydantic's errors: the field as the user wrote it, and plain words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

Path = tuple[str | int, ...]
FIELD = "field"
"""In an error's context: a field below the place of the error, which the error is about."""
UNKNOWN_KIND = "unknown_kind"
"""An error's type: an object's field `type` names no kind that is known."""

_BY_TYPE = ("union_tag_invalid", "union_tag_not_found", UNKNOWN_KIND)
_KINDS = {
    "text": ("string_type", "string_sub_type"),
    "text that is valid Unicode": ("string_unicode",),
    "a whole number": ("int_type", "int_parsing", "int_from_float"),
    "a whole number that is less large": ("int_parsing_size",),
    "a number": ("float_type", "float_parsing"),
    "a finite number": ("finite_number",),
    "true or false": ("bool_type", "bool_parsing"),
    "a list": ("list_type",),
    "an object": ("dict_type", "model_type", "model_attributes_type"),
    "null": ("none_required",),
}
_PLAIN = {kind: f"should be {told}" for told, kinds in _KINDS.items() for kind in kinds} | {
    "missing": "is missing",
    "greater_than": "should be more than {gt}",
    "greater_than_equal": "should be at least {ge}",
    "less_than": "should be less than {lt}",
    "less_than_equal": "should be at most {le}",
    "string_too_short": "needs at least {min_length} characters",
    "string_too_long": "may have at most {max_length} characters",
    "string_pattern_mismatch": "should match {pattern}",
    "too_short": "needs at least {min_length} entries, and has {actual_length}",
    "too_long": "may have at most {max_length} entries",
    "literal_error": "should be {expected}",
    "value_error": "{error}",
    "union_tag_invalid": "should be {expected_tags}",
    "union_tag_not_found": "is missing",
}
_SHOULD = "should be "


def complaint(errors: Sequence[Mapping[str, Any]], body: Any) -> tuple[str | None, str]:
    """(the field's path, such as `messages[1].content`; what is wrong with it).

    Where a field may be of several kinds, pydantic tells what is wrong with the value as each of them. The kind that
    was meant is the one of which most is right: its errors lie deepest, and furthest behind.

    Args:
        errors: as pydantic tells them.
        body: what they are about.
    """
    placed = [(_path(error, body), _kinds(error, body), error) for error in errors]
    deepest = max(len(path) for path, _, _ in placed)
    first: dict[tuple[str, ...], Path] = {}
    for path, kinds, _ in placed:
        if len(path) == deepest:
            first.setdefault(kinds, path)
    chosen = max(first.values(), key=lambda path: [part if isinstance(part, int) else 0 for part in path])
    told = list(dict.fromkeys(_told(error) for path, _, error in placed if path == chosen))
    also = [each.removeprefix(_SHOULD) if told[0].startswith(_SHOULD) else each for each in told[1:]]
    return _spelled(chosen) or None, " or ".join([told[0], *also])


def _path(error: Mapping[str, Any], body: Any) -> Path:
    """The part of an error's place that is in the body; pydantic's names of kinds stand between."""
    path: list[str | int] = []
    value = body
    for part in error["loc"]:
        if (isinstance(value, dict) and part in value) or (isinstance(value, list) and isinstance(part, int)):
            value = value[part]
            path.append(part)
    if error["type"] == "missing":
        path.append(error["loc"][-1])
    if error["type"] in _BY_TYPE:
        path.append("type")
    below = error.get("ctx", {}).get(FIELD)
    return (*path, below) if below else tuple(path)


def _kinds(error: Mapping[str, Any], body: Any) -> tuple[str, ...]:
    """Pydantic's names of kinds in an error's place."""
    known = set(_path(error, body))
    return tuple(str(part) for part in error["loc"] if part not in known)


def _told(error: Mapping[str, Any]) -> str:
    made = _PLAIN.get(error["type"])
    if made is not None:
        return made.format(**error.get("ctx", {}))
    told = str(error["msg"]).removeprefix("Input ")
    return told[:1].lower() + told[1:] if told.startswith("Should") else told


def _spelled(path: Path) -> str:
    told = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path)
    return told.removeprefix(".")
