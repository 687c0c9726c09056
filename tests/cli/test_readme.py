"""The README's console lines, as typed and in their order, on an empty folder.

Bash reads them, with stand-ins on its path for make, pip and python3 -m venv, and one for ktcore that notes its words.
The program itself is then run with each of these words, in this process; serving ends where it would listen.
"""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import uvicorn

from .conftest import Run

ROOT = Path(__file__).resolve().parents[2]
FIRST_WORD = re.compile(r"make |\. |MODEL=|echo |ktcore |printf |pip |python3 ")
# a word that has not been noted yet ends with a zero byte, a command with two
NOTE = """#!/bin/bash
printf '%s\\0' "${0##*/}" "$@" >> "$NOTES"
printf '\\0' >> "$NOTES"
"""
# what make and venv leave behind that later lines look for
SHIMS = {
    "ktcore": NOTE,
    "pip": NOTE,
    "make": NOTE + "mkdir -p .venv/bin && touch .venv/bin/activate\n",
    "python3": NOTE + 'mkdir -p "$3/bin" && touch "$3/bin/activate"\n',
    "python": f'#!/bin/bash\nexec {sys.executable} "$@"\n',
}


def console_blocks() -> list[str]:
    """The indented blocks that are for a shell."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    blocks = re.findall(r"(?:^(?:    .*)?\n)+", text, re.M)
    lines = ["\n".join(line[4:] for line in block.splitlines()).strip() for block in blocks]
    return [block for block in lines if FIRST_WORD.match(block)]


@pytest.fixture
def typed(tmp_path: Path, smollm2_path: Path) -> list[list[str]]:
    """What the shell makes of the blocks: the words of each command, the variable MODEL and quotes resolved."""
    work, bin_folder, notes = tmp_path / "work" / "clone", tmp_path / "bin", tmp_path / "notes"
    work.mkdir(parents=True)
    bin_folder.mkdir()
    for name, text in SHIMS.items():
        (bin_folder / name).write_text(text)
        (bin_folder / name).chmod(0o755)
    for name in ("backends", "pyproject.toml", "docs"):
        (work / name).symlink_to(ROOT / name)
    environment = {**os.environ, "PATH": f"{bin_folder}:{os.environ['PATH']}", "NOTES": str(notes)}
    script = "set -eu\n" + "\n".join(console_blocks())
    done = subprocess.run(
        ["bash", "-c", script], cwd=work, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(smollm2_path)
    return [command.split("\0") for command in notes.read_text().split("\0\0") if command]


def test_the_readmes_commands_work_as_typed(
    typed: list[list[str]], ktcore: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path / "work" / "clone")
    monkeypatch.setattr(uvicorn.Server, "run", lambda server, **_: setattr(server, "started", True))
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M))
    for program, *words in typed:
        if program == "make":
            assert words[0] in targets
        elif program == "pip":
            _install(words, monkeypatch)
        elif program == "ktcore" and words[0] == "conformance":
            # pytest of its own; of level 1 one case, the others are the skeleton's own test's business
            _conformance([*words, "--case", "L1.memory.*"])
        elif program == "ktcore":
            done = ktcore(*words, *_less(words[0]), stdin="Hi\n/exit\n" if words[0] == "chat" else "")
            assert done.code == 0, (words, done.err)
    ran = {words[1] for words in typed if words[0] == "ktcore"}
    assert ran >= {"run", "chat", "serve", "convert", "plan", "doctor", "bench", "new-backend", "conformance"}


def _less(command: str) -> list[str]:
    """Words that make a command quick, and let it run beside other tests."""
    if command == "serve":
        with socket.socket() as taken:
            taken.bind(("127.0.0.1", 0))
            return ["--port", str(taken.getsockname()[1])]
    return {"run": ["--max-new-tokens", "4"], "chat": ["--max-new-tokens", "4"], "bench": ["--rounds", "1"]}.get(
        command, []
    )


def _install(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """What pip leaves of the paths among the words; names and options of an index are not asked for."""
    assert words[0] == "install"
    for word in words[1:]:
        extra = re.fullmatch(r"\.\[(\w+)\]", word)
        folder = Path(word).resolve()
        if extra:
            assert f"\n{extra[1]} = [" in Path("pyproject.toml").read_text(encoding="utf-8")
        elif ("/" in word and "://" not in word) or folder.is_dir():
            text = (folder / "pyproject.toml").read_text(encoding="utf-8")
            entry = re.search(r'entry-points."ktcore.backends"\]\n(\w+) = "([\w.]+)"', text)
            if entry is None:
                continue  # kernels that backends share
            monkeypatch.setenv("KTCORE_PLUGINS", f"{os.environ['KTCORE_PLUGINS']},{entry[1]}")
            if ROOT not in folder.parents:
                info = folder / f"{entry[1]}-1.0.dist-info"
                info.mkdir()
                (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {entry[1]}\nVersion: 1.0\n")
                (info / "entry_points.txt").write_text(f"[ktcore.backends]\n{entry[1]} = {entry[2]}\n")
                monkeypatch.syspath_prepend(folder)


def _conformance(words: list[str]) -> None:
    acme = Path("ktcore-acme").resolve()
    environment = {**os.environ, "PYTHONPATH": str(acme), "KTCORE_PLUGINS": "cpu,acme"}
    command = [sys.executable, "-m", "ktcore.cli.main", *words]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "conformance of acme" in done.stdout
