"""What a tool's JSON schema says of one argument: its types, its few values, and where references lead."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any
from urllib.parse import unquote

from ktcore.text.json_schema import rewritten

ANY = frozenset(("string", "null", "boolean", "integer", "number", "array", "object"))
_KINDS: tuple[tuple[type, str], ...] = (
    *((str, "string"), (bool, "boolean"), (int, "integer"), (float, "number"), (list, "array"), (dict, "object")),
)
# A schema nested deeper says nothing of use, and one may refer to itself.
DEPTH = 16


def types_of(schema: Any, root: Any, depth: int = 0) -> frozenset[str]:
    """JSON types that a value may have, by `type`, `enum`, `const`, `$ref` and the words that combine schemas.

    Args:
        root: the whole schema, for references.
    """
    if schema is False:
        return frozenset()
    if not isinstance(schema, Mapping) or depth > DEPTH:
        return ANY
    found = ANY
    given = schema.get("type")
    if given is not None:
        found &= _widened([given] if isinstance(given, str) else given)
    if (values := _listed(schema)) is not None:
        found &= frozenset(map(_kind, values))
    if schema.get("nullable") is True:  # OpenAPI 3.0's word, beside the type
        found |= {"null"}
    if "$ref" in schema:
        found &= types_of(resolved(schema["$ref"], root), root, depth + 1)
    for part in schema.get("allOf") or ():
        found &= types_of(part, root, depth + 1)
    for word in ("anyOf", "oneOf"):
        if schema.get(word):
            found &= frozenset().union(*(types_of(part, root, depth + 1) for part in schema[word]))
    return found


def values_of(schema: Any, root: Any, depth: int = 0) -> list[Any] | None:
    """All values that are allowed, where a schema lists them; None where it does not."""
    if not isinstance(schema, Mapping) or depth > DEPTH:
        return None
    lists = [_listed(schema)]
    if "$ref" in schema:
        lists.append(values_of(resolved(schema["$ref"], root), root, depth + 1))
    lists += [values_of(part, root, depth + 1) for part in schema.get("allOf") or ()]
    for word in ("anyOf", "oneOf"):
        branches = [_branch(part, root, depth + 1) for part in schema.get(word) or ()]
        if branches and all(branch is not None for branch in branches):
            lists.append([value for branch in branches for value in branch or ()])
    known = [values for values in lists if values is not None]
    if not known:
        return None
    first, *others = known
    kept = [value for value in first if all(is_among(value, other) for other in others)]
    allowed = types_of(schema, root)
    return [value for value in kept if _kind(value) in allowed]


def members(schema: Any, root: Any, depth: int = 0) -> tuple[dict[str, Any], frozenset[str]]:
    """An object's properties with their schemas, and which of them are required, references and parts included."""
    if not isinstance(schema, Mapping) or depth > DEPTH:
        return {}, frozenset()
    found: dict[str, list[Any]] = {}
    needed = frozenset(schema.get("required") or ())

    def note(properties: Mapping[str, Any]) -> None:
        for key, value in properties.items():
            found.setdefault(key, []).append(value)

    note(schema.get("properties") or {})
    parts = [resolved(schema["$ref"], root)] if "$ref" in schema else []
    for part in [*parts, *(schema.get("allOf") or ())]:
        more, required = members(part, root, depth + 1)
        note(more)
        needed |= required
    for word in ("anyOf", "oneOf"):
        branches = [members(part, root, depth + 1) for part in schema.get(word) or ()]
        keys = dict.fromkeys(key for branch, _ in branches for key in branch)
        note({key: {"anyOf": [branch[key] for branch, _ in branches if key in branch]} for key in keys})
        if branches:
            needed |= frozenset.intersection(*(required for _, required in branches))
    return {key: each[0] if len(each) == 1 else {"allOf": each} for key, each in found.items()}, needed


def argument_of(schema: Any, key: str) -> Any:
    """The schema of one argument; an empty one where nothing is said of it."""
    found, _ = members(schema, schema)
    if key in found:
        return found[key]
    more = schema.get("additionalProperties") if isinstance(schema, Mapping) else None
    return more if isinstance(more, Mapping) else {}


def resolved(reference: Any, root: Any) -> Any:
    """What `#/…` leads to; an empty schema where it leads nowhere."""
    if not isinstance(reference, str) or not reference.startswith("#"):
        return {}
    found = root
    for step in filter(None, unquote(reference[1:]).split("/")):
        step = step.replace("~1", "/").replace("~0", "~")
        if isinstance(found, Mapping) and step in found:
            found = found[step]
        elif isinstance(found, list) and step.isdecimal() and int(step) < len(found):
            found = found[int(step)]
        else:
            return {}
    return found


def is_among(value: Any, values: Iterable[Any]) -> bool:
    """Whether a value is one of those; 1 is not true, and "1" is neither."""
    return any(_kind(each) == _kind(value) and each == value for each in values)


def fits(value: Any, schema: Any, root: Any) -> bool:
    """Whether a value has a type that is allowed and is listed where values are."""
    listed = values_of(schema, root)
    return _kind(value) in types_of(schema, root) and (listed is None or is_among(value, listed))


def rooted(schema: Any, root: Mapping[str, Any]) -> dict[str, Any]:
    """A part of a schema as one that stands alone: the whole goes along, and references lead into it."""
    text = json.dumps([schema, root])
    if '"$ref"' not in text:
        return dict(schema) if isinstance(schema, Mapping) else {"allOf": [schema]}
    return {"allOf": [_led(schema)], "$defs": {"whole": _led(root)}}


def _led(schema: Any) -> Any:
    return rewritten(schema, _into_whole)


def _into_whole(word: str, value: Any) -> Any:
    leads = word == "$ref" and isinstance(value, str) and value.startswith("#")
    return f"#/$defs/whole{value[1:]}" if leads else value


def _branch(schema: Any, root: Any, depth: int) -> list[Any] | None:
    """Values of a branch; null alone is one."""
    return [None] if types_of(schema, root, depth) == {"null"} else values_of(schema, root, depth)


def _listed(schema: Mapping[str, Any]) -> list[Any] | None:
    if "const" in schema:
        return [schema["const"]]
    return list(schema["enum"]) if isinstance(schema.get("enum"), list) else None


def _kind(value: Any) -> str:
    if isinstance(value, float) and value.is_integer():
        return "integer"
    return "null" if value is None else next(kind for each, kind in _KINDS if isinstance(value, each))


def _widened(types: Iterable[Any]) -> frozenset[str]:
    found = frozenset(each for each in types if isinstance(each, str))
    return found | {"integer"} if "number" in found else found
