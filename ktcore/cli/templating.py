"""Options that shape a conversation's chat template: which one, its variables, tools and documents."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from ktcore.errors import RequestError

_PANEL = "Chat template"

TemplateOption = Annotated[
    str | None,
    typer.Option(
        "--template",
        metavar="NAME",
        rich_help_panel=_PANEL,
        help="One of the model's chat templates by name, or a file with a template's Jinja source.",
    ),
]
SetOption = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="NAME=VALUE",
        rich_help_panel=_PANEL,
        help="A variable of the template, such as enable_thinking=false; the value is JSON or else text. Repeatable.",
    ),
]
ToolsOption = Annotated[
    Path | None,
    typer.Option(
        "--tools", metavar="FILE", rich_help_panel=_PANEL, help="A JSON list of tools that the model may call."
    ),
]
DocumentsOption = Annotated[
    Path | None,
    typer.Option(
        "--documents", metavar="FILE", rich_help_panel=_PANEL, help="A JSON list of documents to answer from."
    ),
]


@dataclass(frozen=True)
class Templating:
    """A conversation's template, its variables, tools and documents."""

    template: TemplateOption = None
    variables: SetOption = None
    tools: ToolsOption = None
    documents: DocumentsOption = None

    def given(self) -> dict[str, Any]:
        """The options as `Model.chat` takes them, only those that were given.

        Raises:
            RequestError: a file cannot be read or holds something else, or a variable has no value.
        """
        given: dict[str, Any] = {}
        if self.template is not None:
            file = Path(self.template)
            given["template"] = _text(file) if file.suffix and file.is_file() else self.template
        if self.variables:
            given["variables"] = dict(_variable(text) for text in self.variables)
        for name, path in (("tools", self.tools), ("documents", self.documents)):
            if path is not None:
                given[name] = _objects(path)
        return given


def _variable(text: str) -> tuple[str, Any]:
    name, given, value = text.partition("=")
    if not given or not name.strip().isidentifier():
        raise RequestError(f"--set {text}: not a variable with its value", "write it like --set enable_thinking=false")
    try:
        return name.strip(), json.loads(value)
    except ValueError:
        return name.strip(), value


def _objects(path: Path) -> list[dict[str, Any]]:
    try:
        found = json.loads(_text(path))
    except ValueError as error:
        raise RequestError(f"{path}: not JSON: {error}") from error
    if not isinstance(found, list) or not all(isinstance(item, dict) for item in found):
        raise RequestError(f"{path}: expected a JSON list of objects, found {type(found).__name__}")
    return found


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RequestError(f"{path} cannot be read: {error}") from error
