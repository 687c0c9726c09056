"""The Makefile's steps say what they do, and the one that fails is named."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
# makes what venv would, a python that notes what it is asked for and fails at a word
FAKE = """#!/bin/bash
mkdir -p "$3/bin" && cp inner "$3/bin/python"
"""
INNER = """#!/bin/bash
echo "$*" >> asked
case "$*" in *"WORD"*) exit 1;; esac
"""


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A folder with the Makefile and its inputs' names."""
    if shutil.which("make") is None:
        pytest.skip("there is no make")
    shutil.copy(ROOT / "Makefile", tmp_path)
    for name in ("pyproject.toml", "CMakeLists.txt"):
        (tmp_path / name).touch()
    (tmp_path / "csrc").mkdir()
    return tmp_path


def run(tree: Path, word: str, *targets: str) -> subprocess.CompletedProcess[str]:
    """make, with a Python whose pip fails at `word`."""
    fake = tree / "fake-python"
    for path, text in ((fake, FAKE), (tree / "inner", INNER.replace("WORD", word))):
        path.write_text(text)
        path.chmod(0o755)
    command = ["make", f"PYTHON={fake}", *targets]
    # `make test` runs this: its own settings are not this make's
    ours = ("MAKEFLAGS", "MAKELEVEL", "MFLAGS", "MAKEOVERRIDES", "TORCH", "TORCH_INDEX")
    environment = {name: value for name, value in os.environ.items() if name not in ours}
    return subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    ("word", "step"),
    [("torch==", "installing torch=="), ("pybind11", "installing what builds ktcore"), ("ktcore.demo", "fetching")],
)
def test_the_step_that_fails_is_named(tree: Path, word: str, step: str) -> None:
    done = run(tree, word, "model")
    assert done.returncode != 0
    assert f"==> failed: {step}" in done.stderr
    assert "==> making .venv" in done.stdout


def test_each_long_step_says_so_and_nothing_else_is_printed(tree: Path) -> None:
    done = run(tree, "nothing fails", "model")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 4
    assert all(line.startswith("==> ") for line in lines)
    assert run(tree, "nothing fails", "model").stdout == ""


def test_the_index_of_torch_is_for_torch_alone(tree: Path) -> None:
    run(tree, "nothing fails", "TORCH_INDEX=https://example.org/cpu", "model")
    (line,) = [line for line in (tree / "asked").read_text().splitlines() if "--index-url" in line]
    assert "install --quiet torch==" in line
    assert line.endswith("--index-url https://example.org/cpu")
