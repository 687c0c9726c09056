"""The benchmark of a step's parts names them all and counts their bytes once."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "step_parts.py"


def test_a_step_s_parts_read_about_what_the_file_holds(smollm2_path: Path) -> None:
    command = [sys.executable, str(SCRIPT), str(smollm2_path), "--steps", "2", "--rounds", "2", "--threads", "1"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    lines = [line.split() for line in done.stdout.splitlines()[1:]]
    megabytes = {line[0]: float(line[3]) for line in lines}
    assert list(megabytes) == ["embedding", "attention", "dense", "norm", "head", "sampler", "between", "step"]
    # its head is the embedding's table; what else is in the file are names and the tokenizer
    stored = smollm2_path.stat().st_size / 1e6
    assert 0.9 * stored < megabytes["step"] < stored
