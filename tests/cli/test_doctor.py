"""`ktcore doctor`: what it reports of the machine and of backends, broken ones among them."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import torch

import ktcore as package

from .conftest import Run
from .test_errors import FAR, install

KEYS = {"ktcore", "python", "executable", "packages", "torch", "machine", "rule_folders", "backends", "host", "auto"}
BROKEN = "raise ValueError('half of it is missing')\n"


def test_json_describes_the_machine(ktcore: Run) -> None:
    found = ktcore("doctor", "--json").json
    assert set(found) == KEYS
    assert found["packages"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    machine = found["machine"]
    assert (found["ktcore"], found["executable"]) == (package.__version__, sys.executable)
    assert machine["cpu"]
    assert machine["os"].startswith("Linux ") or sys.platform != "linux"
    (host,) = found["backends"]
    assert (host["state"], host["accelerator"], host["traceback"]) == ("loaded", False, None)
    assert host["declared"]
    assert host["requirements"]
    assert machine["logical_cpus"] == len(os.sched_getaffinity(0))
    assert 0 < machine["physical_cores"] <= machine["logical_cpus"]
    assert 0 < machine["memory_available_bytes"] <= machine["memory_bytes"]
    assert sum(len(node["cpus"]) for node in machine["numa_nodes"]) == machine["logical_cpus"]
    assert all((Path(folder) / "base").is_dir() for folder in found["rule_folders"][:1])
    assert [record["name"] for record in found["backends"]] == ["cpu"]
    assert found["auto"] == {"backend": "cpu", "reason": "No accelerator is available, so cpu is used."}


@pytest.mark.parametrize("usable", [True, False])
def test_a_torch_that_is_built_for_a_device_which_is_not_there_is_named(
    ktcore: Run, monkeypatch: pytest.MonkeyPatch, usable: bool
) -> None:
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("mtia"))
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: usable)
    out = ktcore("doctor").out
    assert "built for mtia" in out
    assert ("download.pytorch.org/whl/cpu" in out) is not usable


def test_a_torch_for_cpus_alone_is_said_to_be_that(ktcore: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: None)
    found = ktcore("doctor", "--json").json["torch"]
    assert found == {"built_for": None, "usable": False, "advice": None}
    assert "built for CPUs alone" in ktcore("doctor").out


def test_the_instruction_set_in_use_is_a_supported_one(ktcore: Run) -> None:
    host = ktcore("doctor", "--json").json["host"]
    (used,) = (feature.removeprefix("isa:") for feature in host["features"] if feature.startswith("isa:"))
    assert used in host["properties"]["isa_supported"].split()
    assert "scalar" in host["properties"]["isa_supported"].split()
    out = ktcore("doctor").out
    assert f"{used} in use" in out
    assert "KTCORE_ISA" in out


def test_backends_are_listed_with_state_and_reason(
    ktcore: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(tmp_path, monkeypatch, "far", FAR)
    install(tmp_path, monkeypatch, "torn", BROKEN)
    found = {record["name"]: record for record in ktcore("doctor", "--json").json["backends"]}
    assert {name: record["state"] for name, record in found.items()} == {
        "cpu": "loaded",
        "far": "unavailable",
        "torn": "broken",
    }
    assert found["far"]["reason"] == "it is on another planet"
    assert found["far"]["distribution"] == "far-plugin 1.0"
    assert "half of it is missing" in found["torn"]["traceback"]

    plain, verbose = ktcore("doctor"), ktcore("doctor", "--verbose")
    assert plain.code == verbose.code == 0
    assert "it is on another planet" in plain.out
    assert "Traceback" not in plain.out
    assert "Traceback" in verbose.out


def test_a_plugin_that_is_not_installed_is_an_error(ktcore: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KTCORE_PLUGINS", "absent")
    done = ktcore("doctor")
    assert done.code == 1
    assert "plugin 'absent' was asked for, but is not installed" in done.err
