"""Ctrl-C, SIGTERM and a closed pipe as real signals of another process: exit codes, and nothing half done."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

ENV = {**os.environ, "KTCORE_PLUGINS": "cpu", "OMP_NUM_THREADS": "1"}
TERMINAL, MEASURE = "ktcore.cli.terminal", "ktcore.cli.measure"
START = """
import importlib, json, os, sys, time
from ktcore.cli.main import main

def now(seconds=60.0):
    sys.stderr.write("NOW\\n")
    sys.stderr.flush()
    time.sleep(seconds)
"""
# Runs commands one after the other; each waits at a function of its own until a signal comes.
SEVERAL = (
    START
    + """
for words, module, name, after in json.loads(sys.argv[1]):
    module = importlib.import_module(module)
    real = getattr(module, name)

    def stops(*given, **options):
        if after:
            real(*given, **options)
        now(60.0 if after != "goes on" else 0.0)

    setattr(module, name, stops)
    try:
        main(words)
        code = None
    except SystemExit as left:
        code = left.code
    finally:
        setattr(module, name, real)
    sys.stderr.write(f"LEFT {code}\\n")
    sys.stderr.flush()
"""
)
IMPORTING = (
    START
    + """
class Finder:
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name == "torch":
            now()

sys.meta_path.insert(0, Finder)
try:
    main(sys.argv[1:])
finally:
    sys.stderr.write("CLEANED UP")
"""
)
Start = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def start() -> Iterator[Start]:
    """start(source, *words) -> a process, in which Ctrl-C counts even where the tests' own ignore it."""
    processes: list[subprocess.Popen[str]] = []

    def run(source: str, *words: object) -> subprocess.Popen[str]:
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        heard = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        command = [sys.executable, "-c", heard + source, *map(str, words)]
        processes.append(subprocess.Popen(command, **pipes, text=True, env=ENV))
        return processes[-1]

    yield run
    for process in processes:
        process.kill()
        process.communicate()


def until(process: subprocess.Popen[str], begins: str) -> list[str]:
    """Lines of stderr up to the one that begins so."""
    assert process.stderr is not None
    lines = []
    for line in process.stderr:
        lines.append(line)
        if line.startswith(begins):
            return lines
    raise AssertionError("".join(lines))


def test_ctrl_c_ends_commands_with_130_and_leaves_nothing_half_done(
    start: Start, tiny_llama: Path, smollm2_path: Path, tmp_path: Path
) -> None:
    port = "18641"
    where = ["--backend", "cpu", "-t", "1"]
    packed = tmp_path / "packed"
    cases = [
        (["run", str(tiny_llama), "Hi", *where], "ktcore.engine.model", "load_modules", ""),
        (["run", str(smollm2_path), "Hi", "--raw", "-n", "500", *where], TERMINAL, "write", "goes on"),
        (
            ["bench", str(tiny_llama), "-p", "4", "-n", "2", "--rounds", "100000", *where],
            "ktcore.cli.measure",
            "_one_round",
            "goes on",
        ),
        (["convert", str(tiny_llama), str(packed), *where], "ktcore.engine.load.convert", "keep_tensors", ""),
        (["serve", str(tiny_llama), "--port", port, *where], "ktcore.cli.listen", "_tell", "goes on"),
    ]
    process = start(SEVERAL, json.dumps(cases))
    for words, *_ in cases:
        until(process, "NOW")
        process.send_signal(signal.SIGINT)
        said = until(process, "LEFT")
        assert said[-1] == "LEFT 130\n", (words, said)
        assert "Traceback" not in "".join(said)
    assert not packed.exists()


def test_ctrl_c_while_something_is_imported_ends_at_once(start: Start, tiny_llama: Path) -> None:
    process = start(IMPORTING, "run", tiny_llama, "Hi")
    until(process, "NOW")
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=20)
    assert (process.returncode, out, err) == (130, "", "")


def test_a_closed_pipe_ends_an_answer_without_a_traceback(start: Start, smollm2_path: Path) -> None:
    source = "from ktcore.cli.main import main; main()"
    process = start(source, "run", smollm2_path, "Once upon a time", "--raw", "-n", 400, "--backend", "cpu")
    assert process.stdout is not None
    assert process.stderr is not None
    assert process.stdout.read(1)
    process.stdout.close()
    err = process.stderr.read()
    assert process.wait(60) == 1
    assert "Traceback" not in err
    assert "Exception ignored" not in err
