"""The benchmark of Python's share names native calls: it runs, and finds most of a step in them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "python_share.py"


def test_the_native_calls_it_wraps_are_those_that_a_step_makes(smollm2_path: Path) -> None:
    command = [sys.executable, str(SCRIPT), str(smollm2_path), "--steps", "3", "--threads", "1"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert {"MLPBlock: ", "AttentionBlock: ", "linear: "} <= {
        line.strip().split(" ")[0] + " " for line in done.stdout.splitlines()[2:]
    }
