#!/usr/bin/env python3
"""Writes docs/structure.md: every module in one sentence, which is the first sentence of its own docstring.

python docs/structure.py
"""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "structure.md"
ROOMS = (
    "ktcore",
    "ktcore/ops",
    "ktcore/graph",
    "ktcore/weights",
    "ktcore/backend",
    "ktcore/rules",
    "ktcore/placement",
    "ktcore/text",
    "ktcore/engine",
    "ktcore/dialects",
    "ktcore/server",
    "ktcore/conformance",
    "ktcore/cli",
    "backends/cpu",
    "csrc",
    *sorted(f"backends/{path.name}" for path in (ROOT / "backends").iterdir() if path.is_dir() and path.name != "cpu"),
    "benchmarks",
)
CSRC = "The native kernels of the CPU backend: C++17 with pybind11, one translation unit an instruction set."
HEAD = """# Structure

Every module in one sentence, room by room, in the order of the imports: a room imports only rooms above it. This page
is written by `python docs/structure.py` from the modules' own docstrings.

    checkpoint ──graph──▶ Graph ──rules + backend──▶ Plan ──weights──▶ packed modules ──engine──▶ tokens

`rules/` holds the shipped rule files ([rules.md](rules.md)), `tests/` a folder for every room.
"""


def page(root: Path = ROOT) -> str:
    """The text of structure.md for the tree below `root`."""
    parts = [HEAD]
    for room in ROOMS:
        rows = [f"| `{name}` | {what} |" for name, what in modules(root / room, shallow=room == "ktcore")]
        if rows:
            about = CSRC if room == "csrc" else _room_sentence(root / room)
            parts.append(
                "\n".join([f"## {room}", *([about] if about else []), "", "| module | |", "|---|---|", *rows, ""])
            )
    return "\n".join(parts)


def modules(room: Path, shallow: bool = False) -> list[tuple[str, str]]:
    """(path within the room, first sentence) of each source file, folders after the files beside them."""
    found = []
    for path in sorted(room.glob("*" if shallow else "**/*"), key=lambda p: (len(p.parts), p)):
        if "build" in path.relative_to(room).parts:
            continue
        if path.suffix in (".py", ".cpp", ".h") and (path.name != "__init__.py" or _is_inner_package(path, room)):
            sentence = first_sentence(path)
            if sentence:
                found.append((str(path.relative_to(room)).replace("/__init__.py", "/"), sentence.replace("|", "\\|")))
    return found


def first_sentence(path: Path) -> str:
    """The first sentence of a Python docstring or of the comment that a C++ file opens with."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".py":
        about = ast.get_docstring(ast.parse(text)) or ""
    else:
        about = "\n".join(re.sub(r"^// ?", "", line) for line in re.findall(r"\A((?://.*\n)+)", text)[:1])
        about = about.replace("\n// ", "\n").replace("\n//", "\n")
    paragraph = " ".join(about.strip().split("\n\n")[0].split())
    return re.split(r"(?<=\.)\s(?=[A-Z])", paragraph)[0]


def _is_inner_package(path: Path, room: Path) -> bool:
    """Whether an __init__.py speaks for a folder inside of the room, and not for the room itself."""
    return path.parent != room and path.parent.parent != ROOT / "backends" / room.name


def _room_sentence(room: Path) -> str:
    package = next((p for p in (room / "__init__.py", *sorted(room.glob("*/__init__.py"))) if p.is_file()), None)
    return first_sentence(package) if package else ""


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
