"""The program as a whole: help, version, lazy imports, exit codes, sizes."""

from __future__ import annotations

import inspect
import subprocess
import sys
from pathlib import Path

import pytest
import typer

import ktcore as package
from ktcore.cli.commands.chat import chat
from ktcore.cli.commands.run import run
from ktcore.cli.options import parse_size
from ktcore.ops.sampling import SamplingParams

from .conftest import Run

COMMANDS = ("run", "chat", "plan", "doctor", "bench")
LAZY = """
import sys
from ktcore.cli.main import main
try:
    main(sys.argv[1:])
except SystemExit as left:
    assert left.code == 0, left.code
unwanted = {"torch", "transformers", "numpy", "gguf", "pluggy", "psutil", "ssl"}
heavy = {name.split(".")[0] for name in sys.modules} & unwanted
assert not heavy, heavy
"""


@pytest.mark.parametrize("words", [["--help"], ["run", "--help"], ["doctor", "--help"], ["--version"]])
def test_help_imports_nothing_heavy(words: list[str]) -> None:
    done = subprocess.run([sys.executable, "-c", LAZY, *words], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_help_lists_all_commands(ktcore: Run) -> None:
    out = ktcore("--help").out
    for command in COMMANDS:
        assert f" {command} " in out


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_teaches_by_example(ktcore: Run, command: str) -> None:
    done = ktcore(command, "--help")
    assert done.code == 0
    assert f"  ktcore {command}" in done.out


def test_version(ktcore: Run) -> None:
    assert ktcore("--version").out == f"ktcore {package.__version__}\n"


def test_wrong_usage_is_exit_code_2(ktcore: Run) -> None:
    assert ktcore("--bogus").code == 2
    assert ktcore("plan", "model", "--bogus").code == 2


def test_it_runs_as_a_module() -> None:
    command = [sys.executable, "-m", "ktcore.cli.main", "plan", "/nothing/here"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith("error: /nothing/here: no such file or folder")


def test_ctrl_c_is_exit_code_130(ktcore: Run, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*words: object, **options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("ktcore.rules.prepare.prepare", interrupted)
    done = ktcore("plan", tiny_llama)
    assert done.code == 130
    assert "Traceback" not in done.err


@pytest.mark.parametrize("command", [run, chat])
def test_sampling_defaults_are_those_of_the_api(command: object) -> None:
    given = inspect.signature(command).parameters  # type: ignore[arg-type]
    fields = SamplingParams.__dataclass_fields__
    # what a person at a prompt seldom asks for is left to the API and the server
    assert fields.keys() - given.keys() == {"typical_p", "presence_penalty", "frequency_penalty", "logit_bias"}
    for name in fields.keys() & given.keys():
        assert given[name].default == fields[name].default, name


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("24GiB", 24 * 2**30),
        ("2GB", 2 * 10**9),
        ("512M", 512 * 10**6),
        ("1.5 KiB", 1536),
        ("8gi", 8 * 2**30),
        ("1000", 1000),
        ("7B", 7),
    ],
)
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GiB", "1iB", "3Q", "-4G", "0", "1e9"])
def test_what_is_not_a_size(text: str) -> None:
    with pytest.raises(typer.BadParameter):
        parse_size(text)
