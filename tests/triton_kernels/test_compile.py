"""Every kernel compiles for every target, within its shared memory and spilling hardly a register.

KTCORE_TRITON_FULL=1 compiles every configuration; without it one or two represent a kernel. What the compiler found is
kept in build/ under a hash of all that it depends on: kernels, configurations, chips, the compiler's version.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

from .targets import TARGETS, Target

SPILL = 16
"""Bytes of stack a thread: four registers may go there."""
KNOWN_SPILLS = {
    ("gfx1100", "attention-latent"): 1024,
    ("gfx1100", "attention-prefill-192"): 512,
    ("gfx1100", "attention-chosen-latent"): 1024,
    ("gfx1201", "attention-latent"): 64,
    ("gfx1201", "attention-chosen-latent"): 64,
}
"""Where the default launch shape takes more: a backend for such a chip brings a shape of its own."""

HERE = Path(__file__).parent
PACKAGE = HERE.parents[1] / "backends" / "triton"
FULL = os.environ.get("KTCORE_TRITON_FULL", "") not in ("", "0")


@pytest.mark.parametrize("target", TARGETS, ids=lambda t: t.name)
def test_kernels_compile_within_the_chips_limits(target: Target) -> None:
    found = [json.loads(line) for line in _compiled(target).splitlines()]
    assert found
    assert not [f for f in found if "error" in f]
    assert not [f for f in found if f["shared"] > target.shared], target.shared
    assert not [f for f in found if f["spilled"] > KNOWN_SPILLS.get((target.name, f["name"]), SPILL)]
    assert all(f["code"] > 1000 and f["registers"] > 0 for f in found)


def _compiled(target: Target) -> str:
    """The compiler's answers, a line of JSON each, from build/ where nothing has changed since."""
    digest = hashlib.sha256(f"{target!r} {FULL} {version('triton')}".encode())
    for path in sorted([*PACKAGE.rglob("*.py"), *HERE.glob("*.py")]):
        digest.update(path.name.encode() + path.read_bytes())
    kept = HERE.parents[1] / "build" / "triton-compiled" / f"{target.name}-{digest.hexdigest()[:20]}.jsonl"
    if kept.is_file():
        return kept.read_text()
    command = [sys.executable, "-W", "ignore", str(HERE / "compile_all.py"), target.name, *(["full"] if FULL else [])]
    paths = os.pathsep.join((str(PACKAGE), str(HERE.parents[1]), os.environ.get("PYTHONPATH", "")))
    environment = {**os.environ, "TRITON_INTERPRET": "0", "PYTHONPATH": paths}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    if '"error"' not in done.stdout:
        kept.parent.mkdir(parents=True, exist_ok=True)
        partial = kept.with_suffix(f".{os.getpid()}")
        partial.write_text(done.stdout)
        partial.replace(kept)
    return done.stdout
