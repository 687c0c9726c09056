"""A simulated accelerator is used when it is named, and never taken by "auto"."""

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
