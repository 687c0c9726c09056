"""The kit as vendors start it: by pytest, by the command line, with wrong names too."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from typer.testing import CliRunner

from ktcore.cli.commands.conformance import app
from ktcore.conformance import Status
from ktcore.conformance.report import load_report, save_report

from .test_report import report, result

CASES = ["L0.packaging.inert", "L1.copy.sizes", "L2.linear.Q8_0.7x512x100", "L2.linear.not-a-number"]


def kit(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """As the entry point does it, wherever the shell stands."""
    command = [sys.executable, "-m", "pytest", "-p", "ktcore.conformance.plugin", "--pyargs", "ktcore.conformance"]
    return subprocess.run([*command, *arguments], cwd=folder, capture_output=True, text=True, timeout=200, check=False)


def test_pytest_runs_the_chosen_cases_of_the_host_backend_and_writes_a_report(tmp_path: Path) -> None:
    path = tmp_path / "cpu.json"
    chosen = [word for case in CASES for word in ("--case", case)]
    run = kit(tmp_path, "--backend", "cpu", "--seed", "5", "--report", str(path), *chosen)
    assert run.returncode == 0, run.stdout
    written = load_report(path)
    assert [r.id for r in written.results] == CASES
    assert written.results[2].status is Status.PASS
    assert (written.backend, written.seed, written.selection) == ("cpu", 5, "cases " + ", ".join(CASES))
    assert "L2.linear.Q8_0.7x512x100" not in run.stderr


WRONG = {
    "needs --backend NAME": [],
    "backend 'cqu' is unknown": ["--backend", "cqu"],
    "no case is called 'L2.liner'": ["--backend", "cpu", "--case", "L2.liner"],
}
ONE_AFTER_ANOTHER = """
import json, sys, pytest
for words in json.loads(sys.argv[1]):
    print("ended with", int(pytest.main(["-p", "ktcore.conformance.plugin", "--pyargs", "ktcore.conformance", *words])))
    print("NEXT", flush=True)
"""


def test_a_wrong_word_is_one_error(tmp_path: Path) -> None:
    command = [sys.executable, "-c", ONE_AFTER_ANOTHER, json.dumps(list(WRONG.values()))]
    run = subprocess.run(
        command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=200, check=False
    )
    for message, said in zip(WRONG, run.stdout.split("NEXT")[:-1], strict=True):
        assert message in said
        assert "ended with 4" in said  # pytest's usage error


def test_compare_ends_with_1_when_something_got_worse(tmp_path: Path) -> None:
    paths = [tmp_path / "old.json", tmp_path / "new.json"]
    for path, status in zip(paths, (Status.PASS, Status.FAIL), strict=True):
        save_report(report(result("L2.linear.bias", status)), path)
    worse = CliRunner().invoke(app, ["compare", *map(str, paths)])
    assert worse.exit_code == 1
    assert "L2.linear.bias: PASS -> FAIL" in worse.output
    assert CliRunner().invoke(app, ["compare", *map(str, reversed(paths))]).exit_code == 0
    assert "nothing changed" in CliRunner().invoke(app, ["compare", str(paths[0]), str(paths[0])]).output


def test_render_writes_both_pages(tmp_path: Path) -> None:
    save_report(report(result("L2.linear.bias", Status.PASS)), tmp_path / "alpha.json")
    done = CliRunner().invoke(app, ["render", str(tmp_path), "--never-run", "omega"])
    assert done.exit_code == 0
    assert "omega" in (tmp_path / "matrix.md").read_text()
    assert "omega" in (tmp_path / "matrix.html").read_text()


def test_list_prints_cases_without_a_backend() -> None:
    done = CliRunner().invoke(app, ["run", "--list", "--level", "0"])
    assert done.exit_code == 0
    assert "L0.packaging.inert" in done.output
    assert "L1." not in done.output


def test_the_report_has_a_schema_that_tools_can_use() -> None:
    from ktcore.conformance.report import Report

    schema = json.dumps(Report.model_json_schema())
    assert all(word in schema for word in ("PASS-FALLBACK", "run on hardware", "schema_version"))
