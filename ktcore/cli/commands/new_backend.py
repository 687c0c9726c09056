"""`ktcore new-backend`: writes a plugin package that loads and passes the first levels of the conformance kit."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Annotated

import typer

from ktcore.cli.groups import grouped
from ktcore.errors import KtcoreError

_NAME = re.compile(r"[a-z][a-z0-9_]*")
_SUFFIX = ".tmpl"
TEMPLATES = Path(__file__).parent / "templates" / "backend"


@grouped
def new_backend(
    name: Annotated[str, typer.Argument(help="The backend's name: what people will type after --backend.")],
    folder: Annotated[Path | None, typer.Option("--to", help="Folder to write.  [default: ./ktcore-NAME]")] = None,
) -> None:
    """Write a new backend package: it installs, loads, and passes levels 0 and 1 with the host as a stand-in.

    Example: `ktcore new-backend acme && pip install -e ktcore-acme && ktcore doctor`
    """
    target = write_package(name, folder or Path(f"ktcore-{name}"))
    typer.echo(f"wrote {target}; its README.md says what to implement next:\n")
    typer.echo((target / "README.md").read_text(encoding="utf-8"))


def write_package(name: str, target: Path) -> Path:
    """Write the package and return its folder.

    Raises:
        KtcoreError: the name is not usable or taken, or the folder exists.
    """
    if not _NAME.fullmatch(name):
        raise KtcoreError(f"'{name}' cannot name a backend", "use lower-case letters, digits and '_', a letter first")
    taken = _taken(name)
    if taken:
        raise KtcoreError(f"'{name}' cannot name a backend: {taken}", "take another name")
    if target.exists():
        raise KtcoreError(f"{target} exists already", "give another folder with --to")
    from string import Template

    words = {"name": name, "package": f"ktcore_{name}", "title": name.title().replace("_", "")}
    # everything is filled in before the first file is written
    texts = {path: Template(text).substitute(words) for path, text in _templates().items()}
    for path, text in texts.items():
        parts = [words["package"] if part == "package" else part for part in path.parts]
        place = target.joinpath(*parts)
        if place.name == "overlay.yaml":
            place = place.with_name(f"{name}.yaml")
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text(text, encoding="utf-8")
    return target


def _taken(name: str) -> str | None:
    """Who has the name, or its package's, already."""
    import importlib.util
    import keyword
    from importlib.metadata import entry_points

    from ktcore.backend.discovery import RESERVED
    from ktcore.backend.hookspecs import ENTRY_POINT_GROUP

    if keyword.iskeyword(name) or keyword.issoftkeyword(name):
        return "it is a word of Python"
    if name in RESERVED:
        return "it means something else in rules and on the command line"
    if name in sys.stdlib_module_names:
        return "it is a module of Python"
    if name in {entry.name for entry in entry_points(group=ENTRY_POINT_GROUP)}:
        return "an installed backend has it"
    if importlib.util.find_spec(f"ktcore_{name}") is not None:
        return f"a package ktcore_{name} is installed"
    return None


def _templates() -> dict[Path, str]:
    """Relative path, without the suffix, to text."""
    sources = sorted(TEMPLATES.rglob(f"*{_SUFFIX}"))
    return {p.relative_to(TEMPLATES).with_suffix(""): p.read_text(encoding="utf-8") for p in sources}
