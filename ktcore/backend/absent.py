"""What to tell about a backend that is not installed: near names, and how to get the package that brings it.

Names come from metadata alone: of installed distributions, and of the source tree that ktcore was installed from.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from difflib import get_close_matches
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path
from urllib.parse import unquote, urlparse

from ktcore.backend.hookspecs import ENTRY_POINT_GROUP

PACKAGE = "ktcore"

_ENTRIES = re.compile(rf'^\[project\.entry-points\."{re.escape(ENTRY_POINT_GROUP)}"\]\n((?:[\w-]+ *=.*\n?)+)', re.M)
_OWN = re.compile(rf'"{PACKAGE}-([\w-]+)')


def absence_hint(name: str, installed: Iterable[str], tree: Path | None = None) -> str:
    """What to do where backend `name` is unknown.

    Args:
        installed: names of the backends that are known.
        tree: ktcore's source tree; None asks the installed package where it came from.
    """
    offered = offered_backends(source_tree() if tree is None else tree)
    if name in offered:
        return f"{name} is not installed: {_command(name, offered)}"
    near = get_close_matches(name, [*installed, *(n for n in offered if n not in set(installed))], 3, 0.6)
    said = f"did you mean {' or '.join(near)}?" if near else ""
    missing = [n for n in near if n in offered and n not in set(installed)]
    if missing:
        said += f" {missing[0]} is not installed: {_command(missing[0], offered)}"
    return said + f"the package that brings it, {PACKAGE}-{name} by custom, is not installed" * (not near)


def offered_backends(tree: Path | None) -> dict[str, Path]:
    """Backends whose packages lie in the source tree, installed or not: name -> the package's folder."""
    if tree is None:
        return {}
    found = {}
    for file in sorted((tree / "backends").glob("*/pyproject.toml")):
        for block in _ENTRIES.findall(file.read_text(encoding="utf-8")):
            found.update({line.partition("=")[0].strip(): file.parent for line in block.splitlines()})
    return found


def source_tree(package: Distribution | None = None) -> Path | None:
    """The folder that ktcore was installed from, by pip's own record; None where it came from an index or is gone."""
    try:
        text = (package or distribution(PACKAGE)).read_text("direct_url.json")
    except PackageNotFoundError:
        return None
    url = urlparse(str(json.loads(text).get("url", "")) if text else "")
    folder = Path(unquote(url.path))
    return folder if url.scheme == "file" and folder.is_dir() else None


def _command(name: str, offered: dict[str, Path]) -> str:
    """How to install it: with the packages of the same tree that it needs, which no index may have."""
    folder = offered[name]
    needs = _OWN.findall((folder / "pyproject.toml").read_text(encoding="utf-8").replace(f'name = "{PACKAGE}-', ""))
    beside = [folder.parent / need for need in dict.fromkeys(needs) if (folder.parent / need).is_dir()]
    return "`pip install " + " ".join(str(path) for path in (*beside, folder)) + "`"
