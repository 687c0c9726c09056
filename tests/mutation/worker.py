"""Runs tests on one mutant after another, each in a fork of a process that has the slow imports behind it.

Speaks lines of JSON: in come {file, tests, seconds}, out goes {code}: pytest's exit code, or "timeout".
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import time
from importlib.metadata import entry_points
from pathlib import Path

HEAVY = (
    "numpy",
    "torch",
    "pytest",
    "hypothesis",
    "transformers",
    "gguf",
    "safetensors.torch",
    "tokenizers",
    "pydantic",
)


def run(order: dict[str, object]) -> object:
    """Exit code of the chosen tests, which stop at the first failure, or "timeout"."""
    child = os.fork()
    if child == 0:
        os.setsid()
        os._exit(_child(order))
    deadline = time.monotonic() + float(str(order["seconds"]))
    while time.monotonic() < deadline:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            _end(child)
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.02)
    _end(child)
    os.waitpid(child, 0)
    return "timeout"


def _end(group: int) -> None:
    """Nothing that a test started outlives it."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(group, signal.SIGKILL)


def _child(order: dict[str, object]) -> int:
    silent = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(silent, stream)
    import pytest
    from plugin import Chosen

    tests = order["tests"]
    assert isinstance(tests, list)
    files = sorted({test.split("::")[0] for test in tests})
    options = ["-x", "-q", "-p", "no:cacheprovider", "--no-header", "-o", "console_output_style=classic"]
    return int(pytest.main([*options, *files], plugins=[Chosen(tests, str(order["file"]))]))


def main() -> None:
    """Until the input ends."""
    out = os.fdopen(os.dup(1), "w")
    os.environ.setdefault("TRITON_INTERPRET", "1")
    sys.path.insert(0, str(Path(__file__).parent))
    for name in HEAVY:
        with contextlib.suppress(ImportError):
            __import__(name)
    for plugin in entry_points(group="pytest11"):
        if not plugin.module.startswith("ktcore"):
            with contextlib.suppress(ImportError):
                __import__(plugin.module)
    early = sorted(name for name in sys.modules if name.split(".")[0] == "ktcore")
    if early:
        sys.exit(f"mutation: {early[0]} was imported before there was a mutant")
    for line in sys.stdin:
        out.write(json.dumps({"code": run(json.loads(line))}) + "\n")
        out.flush()


if __name__ == "__main__":
    main()
