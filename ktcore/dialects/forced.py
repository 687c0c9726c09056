"""Writes the grammar of answers that must call a tool, in a family's own way and so that its reader reads them back."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from ktcore.dialects.base import Pairs, ToolFormat
from ktcore.dialects.schema import DEPTH, members, resolved, rooted, types_of, values_of
from ktcore.text.json_schema import without_idle_words

_HOLES = re.compile(r"(\{(?:name|arguments|pairs)\})")
_SPACES = {"x-guidance": {"whitespace_pattern": r"[ \n\t]{0,20}"}}


def forced_grammar(made: ToolFormat, tools: Mapping[str, Any], several: bool) -> str:
    """The Lark grammar of an answer that calls one of the tools, or several times one of them.

    Args:
        tools: parameters' JSON schemas by the tools' names.
    """
    rules: list[str] = []
    for number, (name, schema) in enumerate(tools.items()):
        pieces: list[str] = []
        for part in _HOLES.split(made.forced):
            if part == "{arguments}":
                pieces.append(f"arguments_{number}")
                rules.append(f"arguments_{number}: %json {_guided({'type': 'object', **schema})}")
            elif part == "{pairs}":
                assert made.pairs is not None
                pieces += _pairs(made.pairs, number, schema, rules)
            else:
                pieces.append(_literal(name if part == "{name}" else part))
        rules.append(f"call_{number}: {' '.join(pieces)}")
    one = " | ".join(f"call_{number}" for number in range(len(tools)))
    opening, closing = map(_literal, made.section)
    more = "" if made.joint is None or not several else f"({_literal(made.joint)} call)*"
    return "\n".join([f"start: {opening} call {more} {closing}", f"call: {one}", *rules])


def beside_grammar(made: ToolFormat, tools: Mapping[str, Any], several: bool) -> str:
    """The grammar of calls that may stand in place of an answer of another form.

    Where a bare object is a call it is written as JSON all through: beside a form that begins with a brace too, text of
    a call's own would claim the brace and what follows it.
    """
    if not made.bare:
        return forced_grammar(made, tools, several)
    key = "parameters" if '"parameters"' in made.forced else "arguments"
    rules = []
    for number, (name, schema) in enumerate(tools.items()):
        inside = {"type": "object", **rooted(schema, schema)}
        whole = {"name": {"const": name}, key: {k: v for k, v in inside.items() if k != "$defs"}}
        call = {"type": "object", "properties": whole, "required": [*whole], "additionalProperties": False}
        shared = {"$defs": inside["$defs"]} if "$defs" in inside else {}
        rules.append(f"call_{number}: %json {_guided({**call, **shared})}")
    return "\n".join(["start: " + " | ".join(f"call_{number}" for number in range(len(tools))), *rules])


def _literal(text: str) -> str:
    return json.dumps(text, ensure_ascii=False) if text else ""


def _pairs(pairs: Pairs, number: int, schema: Mapping[str, Any], rules: list[str]) -> list[str]:
    """Arguments one by one: the required ones, and the others if the model wants them, in the schema's order."""
    properties, required = members(schema, schema)
    pieces = []
    for place, (key, kind) in enumerate(properties.items()):
        rule = f"argument_{number}_{place}"
        ways = _ways(pairs, key, kind, schema, rule, rules)
        if not ways:
            continue
        rules.append(f"{rule}: {' | '.join(ways)}")
        pieces.append(rule if key in required else f"{rule}?")
    return pieces


def _ways(pairs: Pairs, key: str, kind: Any, root: Mapping[str, Any], rule: str, rules: list[str]) -> list[str]:
    """How one argument can be written: what is listed, free text, and JSON where text would not be read as such."""
    types, values = types_of(kind, root), values_of(kind, root)
    line = "\n" if pairs.lines else ""
    ends = _literal(line + pairs.closes + pairs.after)

    def opened(string: bool) -> str:
        attribute = f' string="{"true" if string else "false"}"' if pairs.typed else ""
        return _literal(pairs.opens + key + pairs.named + attribute + pairs.gap + pairs.begins + line)

    if values is not None:
        return [
            f"{opened(isinstance(v, str))} {_literal(v if isinstance(v, str) else json.dumps(v))} {ends}"
            for v in values
            if not (isinstance(v, str) and pairs.closes in v)
        ]
    ways = []
    if "string" in types:
        rules.append(f"{rule}_text[lazy]: {rule.upper()}_TEXT")
        rules.append(f"{rule.upper()}_TEXT: {_text(pairs, kind, root)}")
        ways.append(f"{opened(True)} {rule}_text {_literal(pairs.after)}")
    if types - {"string"} and ("string" not in types or pairs.typed):
        rules.append(f"{rule}_json: %json {_guided(rooted(kind, root))}")
        ways.append(f"{opened(False)} {rule}_json {ends}")
    return ways


def _text(pairs: Pairs, kind: Any, root: Any) -> str:
    """The expression of a string up to and with its end, of the length and the pattern that a schema asks for."""
    close = ("\n" if pairs.lines else "") + pairs.closes
    end, mark = _escaped(close), _escaped(pairs.closes)
    limits = _parts(kind, root)
    least = max((part["minLength"] for part in limits if isinstance(part.get("minLength"), int)), default=0)
    most = min((part["maxLength"] for part in limits if isinstance(part.get("maxLength"), int)), default=None)
    count = "*" if not least and most is None else f"{{{least},{'' if most is None else most}}}"
    # the first end mark ends it
    found = [rf"/(.|\n){count}{end}/", rf"~/(.|\n)*{mark}(.|\n)+/"]
    for part in limits:
        if isinstance(part.get("pattern"), str):
            found.append(f"/{_unanchored(part['pattern'])}{end}/")
    return " & ".join(found)


def _parts(kind: Any, root: Any, depth: int = 0) -> list[Mapping[str, Any]]:
    """All parts of a schema that a value must meet."""
    if not isinstance(kind, Mapping) or depth > DEPTH:
        return []
    found = [kind]
    more: Sequence[Any] = [*(kind.get("allOf") or ()), *([resolved(kind["$ref"], root)] if "$ref" in kind else ())]
    for part in more:
        found += _parts(part, root, depth + 1)
    return found


def _unanchored(pattern: str) -> str:
    """A schema's pattern as one that matches the whole text: a schema's own may stand anywhere in it."""
    body = pattern.removeprefix("^")
    begin = "" if pattern.startswith("^") else r"(.|\n)*"
    ended = body.endswith("$") and not body.endswith(r"\$")
    body = body[:-1] if ended else body
    body = re.sub(r"(?<!\\)((?:\\\\)*)/", r"\1\\/", body)
    return f"{begin}({body})" + ("" if ended else r"(.|\n)*")


def _escaped(text: str) -> str:
    return re.sub(r"([^\w\s<>\"=｜:-])", r"\\\1", text).replace("\n", r"\n")


def _guided(schema: dict[str, Any]) -> str:
    """A schema as `%json` takes it."""
    return json.dumps({**without_idle_words(schema), **_SPACES})
