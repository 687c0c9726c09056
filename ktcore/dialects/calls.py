"""Reads calls of tools out of an answer's text as it streams, and writes the form of answers that must call one."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from ktcore.dialects.base import Call, ToolFormat
from ktcore.dialects.thoughts import first_of, held_back

_AROUND_PAIRS = {
    "glm": ("<arg_key>{}</arg_key>\n<arg_value>", "</arg_value>\n"),
    "qwen3-coder": ("<parameter={}>\n", "\n</parameter>\n"),
    "invoke": ('<parameter name="{}">', "</parameter>\n"),
    "dsml": ('<｜DSML｜parameter name="{}" string="{}">', "</｜DSML｜parameter>\n"),
}
_HOLES = re.compile(r"(\{(?:name|arguments|pairs)\})")


class Calls:
    """Takes text as it comes and gives (text, calls). What began like a call and was none is text.

    Args:
        tools: parameters' JSON schemas by the tools' names.
    """

    def __init__(self, made: ToolFormat, tools: Mapping[str, Any]) -> None:
        self._format = made
        self._tools = tools
        self._held = ""
        self._inside = False
        self._begun = False
        self._after = False

    def push(self, text: str) -> tuple[str, list[Call]]:
        """What is certain after this piece."""
        self._held += text
        said = ""
        calls: list[Call] = []
        while True:
            if not self._inside:
                said += self._outside()
            if not self._inside:
                return said, calls
            found = self._format.read(self._held, self._tools)
            if found is None:
                return said, calls
            more, size = found
            calls += more
            self._held = self._held[size:]
            self._inside, self._after = False, True

    def flush(self) -> str:
        """What is left at the end, and was no call."""
        if self._after:
            self._skip_ends()
        rest, self._held = self._held, ""
        return "" if self._after and not rest.strip() else rest

    def _outside(self) -> str:
        """Text before the next call, which stays held."""
        if self._after:
            self._skip_ends()
            if any(word.startswith(self._held) for word in self._format.spellings):
                return ""
        start = self._held.lstrip()
        braced = self._format.series if self._after else self._format.bare and not self._begun
        if braced and not start:
            return ""
        if braced and start.startswith("{"):
            self._held, self._inside, self._begun, self._after = start, True, True, False
            return ""
        self._after = False
        at = first_of(self._held, self._format.marks)
        if at >= 0:
            said, self._held = self._held[:at], self._held[at:]
            self._inside = self._begun = True
            # white space before a call is the format's
            return said.rstrip()
        certain = self._held[: len(self._held) - held_back(self._held, self._format.marks)].rstrip()
        self._held = self._held[len(certain) :]
        self._begun |= bool(certain)
        return certain

    def _skip_ends(self) -> None:
        """Leave out what the format writes between and after its calls."""
        while True:
            self._held = self._held.lstrip()
            end = next((end for end in self._format.ends if self._held.startswith(end)), None)
            if end is None:
                return
            self._held = self._held[len(end) :]


def forced_grammar(made: ToolFormat, tools: Mapping[str, Any], several: bool) -> str:
    """The Lark grammar of an answer that calls one of the tools, or several times one of them.

    Args:
        tools: parameters' JSON schemas by the tools' names.
    """
    rules = []
    for number, (name, schema) in enumerate(tools.items()):
        pieces: list[str] = []
        for part in _HOLES.split(made.forced):
            if part == "{arguments}":
                pieces.append(f"arguments_{number}")
                rules.append(f"arguments_{number}: %json {_schema(schema)}")
            elif part == "{pairs}":
                pieces += _pair_rules(made, number, schema, rules)
            else:
                pieces.append(_literal(name if part == "{name}" else part))
        rules.append(f"call_{number}: {' '.join(pieces)}")
    one = " | ".join(f"call_{number}" for number in range(len(tools)))
    opening, closing = map(_literal, made.section)
    more = "" if made.joint is None or not several else f"({_literal(made.joint)} call)*"
    return "\n".join([f"start: {opening} call {more} {closing}", f"call: {one}", *rules])


def _literal(text: str) -> str:
    return json.dumps(text, ensure_ascii=False) if text else ""


def _schema(schema: Any) -> str:
    return json.dumps({"type": "object", **schema, "x-guidance": {"whitespace_pattern": r"[ \n\t]{0,20}"}})


def _pair_rules(made: ToolFormat, number: int, schema: Mapping[str, Any], rules: list[str]) -> list[str]:
    """Arguments one by one: the required ones, and the others if the model wants them, in the schema's order."""
    around = _AROUND_PAIRS[made.name]
    pieces = []
    for place, (key, kind) in enumerate(schema.get("properties", {}).items()):
        rule = f"argument_{number}_{place}"
        plain = isinstance(kind, dict) and kind.get("type") == "string"
        if plain and all(isinstance(value, str) for value in kind.get("enum", ())) and kind.get("enum"):
            value = "(" + " | ".join(json.dumps(v, ensure_ascii=False) for v in kind["enum"]) + ")"
        elif plain:
            value = r"/[^<]+/"
        else:
            value = f"{rule}_value"
            rules.append(f"{rule}_value: %json {json.dumps(kind)}")
        string = "true" if plain else "false"
        rules.append(f"{rule}: {_literal(around[0].format(key, string))} {value} {_literal(around[1])}")
        pieces.append(rule if key in schema.get("required", ()) else f"{rule}?")
    return pieces
