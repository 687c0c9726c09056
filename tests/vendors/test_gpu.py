"""The driver of `make gpu`: steps that fail, take too long or lack their input are recorded, and the others go on."""

from __future__ import annotations

import json
import sys
from importlib.metadata import distributions
from pathlib import Path

import pytest

from . import gpu


def _step(name: str, code: str, limit: float = 60, **more: object) -> gpu.Step:
    return gpu.Step(name, (sys.executable, "-c", code), limit, **more)  # type: ignore[arg-type]


def test_one_steps_failure_does_not_stop_the_others(tmp_path: Path) -> None:
    steps = [
        _step("broken", "raise SystemExit('no such thing')"),
        _step("slow", "import time; time.sleep(30)", limit=1),
        _step("lacking", "", needs=tmp_path / "model.gguf"),
        _step("good", "print('{}')", output="good.json"),
    ]
    assert gpu.run(steps, tmp_path, "sm_0", 400) == 1
    found = json.loads((tmp_path / "gpu-sm_0.json").read_text())["steps"]
    assert [s["status"] for s in found] == ["failed with 1", "stopped after 1 s", "model.gguf is not there", "done"]
    assert "no such thing" in found[0]["end of its log"]
    assert (tmp_path / "good.json").read_text() == "{}\n"


def test_what_the_budget_does_not_reach_is_said(tmp_path: Path) -> None:
    assert gpu.run([_step("late", "")], tmp_path, "sm_0", 1) == 1
    assert json.loads((tmp_path / "gpu-sm_0.json").read_text())["steps"][0]["status"] == "no time left"


def test_the_limits_fit_what_steps_run(tmp_path: Path) -> None:
    for simulate in (True, False):
        for step in gpu.steps("sm_90", tmp_path, simulate):
            script = step.command[1]
            assert script == "-c" or (gpu.ROOT / script).is_file(), step


def test_backends_are_found_without_an_installation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "WORK", tmp_path)
    monkeypatch.setattr(gpu, "ROOT", tmp_path)  # where no wheels lie
    gpu.packages()
    found = {d.metadata["Name"]: d for d in distributions(path=[str(tmp_path / "entry_points")])}
    assert set(found) == {"ktcore", *(f"ktcore-{b}" for b in gpu.BACKENDS)}
    assert [e.value for e in found["ktcore-cuda"].entry_points] == ["ktcore_cuda.plugin"]
