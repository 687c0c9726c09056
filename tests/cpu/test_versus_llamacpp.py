"""The benchmark beside llama-bench binaries: what it asks them for, and which of their figures it takes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
# As both print it, less most fields.
FAKE = """#!/bin/sh
echo "$@" >> {log}
cat <<'END'
{text}
END
"""


def _test(prompt: int, new: int, *samples: float) -> dict[str, Any]:
    return {"n_prompt": prompt, "n_gen": new, "avg_ts": 0.5, "samples_ts": list(samples)}


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import llama_bench

    return llama_bench


def _fake(folder: Path, text: str) -> tuple[Path, Path]:
    binary, log = folder / "llama-bench", folder / "log"
    binary.write_text(FAKE.format(log=log, text=text))
    binary.chmod(0o755)
    return binary, log


def test_ik_is_run_with_repacking_turn_by_turn_with_ktcore(tmp_path: Path, smollm2_path: Path) -> None:
    # as it prints models with latent attention: words between the brackets
    tests = [json.dumps(_test(8, 0, 90, 100, 300)), json.dumps(_test(8, 2, 7, 5, 6))]
    binary, log = _fake(tmp_path, "[\n==== Adjusted tensors\nComputed blk.0 as 512 x 4096\n" + ",\n".join(tests) + "]")
    command = [sys.executable, str(BENCHMARKS / "versus_llamacpp.py"), str(smollm2_path), "--peer", "ik_llama.cpp"]
    command += ["--llama-bench", str(binary), "--rounds", "2", "--prompt", "8", "--new", "2", "--threads", "1"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert [json.loads(line)["engine"] for line in lines[:4]] == ["ktcore", "ik_llama.cpp"] * 2
    summary = json.loads("".join(lines[4:]))
    for phase, theirs in (("prefill_tok_s", 100), ("decode_tok_s", 6)):
        assert summary[phase]["ik_llama.cpp"] == theirs
        assert summary[phase]["ratio"] == pytest.approx(summary[phase]["ktcore"] / theirs, abs=0.02)
    asked = f"-m {smollm2_path} -t 1 -r 3 -o json -rtr 1 -fa 1 -fmoe 1 -p 8 -n 0 -gp 8,2"
    assert log.read_text().splitlines() == [asked, asked]


def test_llama_cpp_decodes_at_the_depth_of_the_prompt(tmp_path: Path, bench: ModuleType) -> None:
    binary, log = _fake(tmp_path, json.dumps([_test(0, 4, 20)]))
    calls = bench.commands("llama.cpp", binary, Path("m"), 16, 4, 2, 3)
    assert [call[1:] for call in calls] == [
        ["-m", "m", "-t", "2", "-r", "3", "-o", "json", "-p", "16", "-n", "0"],
        ["-m", "m", "-t", "2", "-r", "3", "-o", "json", "-p", "0", "-n", "4", "-d", "16"],
    ]
    with pytest.raises(bench.PeerError, match="no prefill_tok_s"):
        bench.measure(calls)
    assert len(log.read_text().splitlines()) == 2


@pytest.mark.parametrize(
    "text", ["", "usage: llama-bench [options]", "[1]", json.dumps([{"n_gen": 0}]), '[{"n_gen": 0']
)
def test_what_is_no_result_is_refused(tmp_path: Path, bench: ModuleType, text: str) -> None:
    binary, _ = _fake(tmp_path, text)
    with pytest.raises(bench.PeerError, match="no JSON of llama-bench"):
        bench.measure([[str(binary)]])


def test_a_binary_that_fails_or_is_not_there_is_told(tmp_path: Path, bench: ModuleType) -> None:
    failing = tmp_path / "failing"
    failing.write_text("#!/bin/sh\necho cannot load >&2\nexit 3\n")
    failing.chmod(0o755)
    with pytest.raises(bench.PeerError, match="ended with 3:\ncannot load"):
        bench.measure([[str(failing)]])
    with pytest.raises(bench.PeerError, match="No such file"):
        bench.measure([[str(tmp_path / "absent")]])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--peer", "ik_llama.cpp"], "needs --llama-bench"),
        (["--llama-bench", "b", "--peer-python", "p"], "runs no Python"),
        (["--peer", "vllm"], "invalid choice"),
    ],
)
def test_arguments_that_do_not_go_together_are_refused(arguments: list[str], message: str) -> None:
    command = [sys.executable, str(BENCHMARKS / "versus_llamacpp.py"), "m.gguf", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2
    assert message in done.stderr
