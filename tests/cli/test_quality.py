"""`ktcore bench --quality` and `ktcore new-backend`."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from ktcore.cli.commands.new_backend import write_package
from ktcore.errors import KtcoreError

from .conftest import Run


def _rules(folder: Path, experts: str) -> Path:
    path = folder / "rules.yaml"
    path.write_text(
        "version: 1\nrules:\n  - {name: mine, match: {op: experts}, use: reference.experts, device: host, "
        f"experts: {experts}}}\n"
    )
    return path


def test_fewer_experts_cost_quality_and_all_of_them_none(ktcore: Run, tiny_moe: Path, tmp_path: Path) -> None:
    def measured(experts: str) -> dict[str, float]:
        rules = _rules(tmp_path, experts)
        return ktcore("bench", tiny_moe, "--quality", "--rules", rules, "--backend", "cpu", "--json").json

    one, all_of_them = measured("{keep: 1}"), measured("{keep: 2}")
    assert one["mean_kl_nats"] > 20 * all_of_them["mean_kl_nats"]
    assert all_of_them["mean_kl_nats"] < 1e-4
    assert one["positions"] == 512
    assert one["experts"] == ["at most 1 a token"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(("--quality",), "--rules FILE"), (("--quality", "--rules", "reference", "--text", "no.txt"), "tokenizer")],
)
def test_what_a_comparison_lacks_is_said(ktcore: Run, tiny_moe: Path, arguments: tuple[str, ...], message: str) -> None:
    done = ktcore("bench", tiny_moe, "--backend", "cpu", *arguments)
    assert done.code == 1
    assert message in done.err
    assert "Traceback" not in done.err


def test_a_new_backend_loads_and_passes_levels_0_and_1(tmp_path: Path) -> None:
    folder = write_package("acme", tmp_path / "ktcore-acme")
    site = tmp_path / "site"
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-build-isolation", "--no-deps"]
    subprocess.run([*install, "--target", str(site), str(folder)], check=True, capture_output=True)
    command = [sys.executable, "-m", "ktcore.cli.main", "conformance", "run", "--backend", "acme", "--level", "1"]
    environment = {**os.environ, "PYTHONPATH": str(site), "KTCORE_PLUGINS": "cpu,acme"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "conformance of acme" in done.stdout
    assert "FAIL" not in done.stdout


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("cpu", "installed backend has it"),
        ("sim", "installed backend has it"),
        ("auto", "means something else"),
        ("reference", "means something else"),
        ("host", "means something else"),
        ("class", "word of Python"),
        ("match", "word of Python"),
        ("json", "module of Python"),
    ],
)
def test_a_name_that_is_taken_is_refused(name: str, why: str, tmp_path: Path) -> None:
    with pytest.raises(KtcoreError, match=why):
        write_package(name, tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_so_is_one_whose_package_is_there_already(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "ktcore_odd").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(KtcoreError, match="a package ktcore_odd is installed"):
        write_package("odd", tmp_path / "x")


def test_a_fresh_backend_is_not_taken_unasked(tmp_path: Path) -> None:
    plugin = write_package("acme", tmp_path / "x") / "ktcore_acme" / "plugin.py"
    assert "experimental=True" in plugin.read_text(encoding="utf-8")


def test_the_kit_without_pytest_says_what_to_install(ktcore: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pytest", None)
    done = ktcore("conformance", "run", "--backend", "cpu")
    assert done.code == 1
    assert "pip install pytest" in done.err


@pytest.mark.parametrize("name", ["Acme", "9lives", "a-b", ""])
def test_a_name_that_cannot_be_a_package_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(KtcoreError, match="cannot name a backend"):
        write_package(name, tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_an_existing_folder_is_left_alone(tmp_path: Path) -> None:
    with pytest.raises(KtcoreError, match="exists already"):
        write_package("acme", tmp_path)
