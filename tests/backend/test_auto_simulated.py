"""A simulated or experimental accelerator is used when it is named, and never taken by "auto"."""

from __future__ import annotations

from dataclasses import replace

import pytest

from ktcore.backend import API_VERSION, BackendSpec, Capabilities, Probe, Registry
from ktcore.backend.discovery import Found
from ktcore.backend.record import BackendRecord

HOST = BackendSpec(
    "host", API_VERSION, "nothing", "none:none", lambda: Probe(True, "here"), (Capabilities("host", "h"),), False
)
DEVICE = replace(HOST, name="acme", accelerator=True, declared=(Capabilities("acme", "a"),))


@pytest.mark.parametrize(("simulated", "chosen"), [(True, "host"), (False, "acme")])
def test_auto_takes_real_accelerators_only(simulated: bool, chosen: str) -> None:
    specs = [HOST, replace(DEVICE, simulated=simulated)]
    registry = Registry([Found(tuple(BackendRecord(s.name, "test 1.0", s) for s in specs))])
    assert registry.choose("auto")[0] == chosen
    assert registry.choose("acme")[0] == "acme"


def test_auto_says_that_an_experimental_one_must_be_named() -> None:
    specs = [HOST, replace(DEVICE, experimental=True)]
    registry = Registry([Found(tuple(BackendRecord(s.name, "test 1.0", s) for s in specs))])
    chosen, why = registry.choose("auto")
    assert chosen == "host"
    assert why == "acme is marked experimental and taken only when it is named, so host is used."
    assert registry.choose("acme")[0] == "acme"
    both = [*specs, replace(DEVICE, name="beta", declared=(Capabilities("beta", "b"),))]
    assert Registry([Found(tuple(BackendRecord(s.name, "t 1", s) for s in both))]).choose("auto")[0] == "beta"
