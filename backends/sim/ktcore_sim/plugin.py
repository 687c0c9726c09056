"""Registers the simulated accelerator; importing this loads no native code and takes nothing of torch."""

from __future__ import annotations

import sys
from importlib.util import find_spec
from pathlib import Path

from ktcore.backend import API_VERSION, BackendSpec, Probe, hookimpl
from ktcore.errors import BackendError
from ktcore_sim.capabilities import describe
from ktcore_sim.options import SimOptions, devices


def probe() -> Probe:
    """Available when the native half is built and the PrivateUse1 key is free; looks, and loads neither."""
    from ktcore_sim.native import UNNAMED, privateuse1_name

    if not sys.platform.startswith("linux"):
        return Probe(False, "guarded memory needs Linux (memfd_create)")
    if find_spec("ktcore_sim._C") is None:
        return Probe(False, "its native module is not built: install ktcore-sim from its folder")
    taken = privateuse1_name()
    if taken not in (UNNAMED, "sim"):
        return Probe(False, f"torch's PrivateUse1 key belongs to '{taken}' in this process")
    try:
        count = devices()
        SimOptions.from_environment()
    except BackendError as error:
        return Probe(False, error.message)
    if count == 0:
        return Probe(False, "KTCORE_SIM_DEVICES=0: no device is simulated")
    return Probe(True, f"{count} simulated device{'s' * (count != 1)}, no hardware", devices=count)


@hookimpl
def ktcore_register_backends() -> list[BackendSpec]:
    """The one backend of this package."""
    return [
        BackendSpec(
            name="sim",
            api_version=API_VERSION,
            requirements="Linux, and a torch whose PrivateUse1 key is free",
            entry="ktcore_sim.backend:SimBackend",
            probe=probe,
            declared=(describe(SimOptions()),),
            simulated=True,
        )
    ]


@hookimpl
def ktcore_rule_paths() -> list[Path]:
    """The overlay `sim.yaml`."""
    return [Path(__file__).parent / "rules"]


@hookimpl
def ktcore_conformance_expectations() -> object:
    """For the conformance kit."""
    from ktcore_sim.conformance import expectations

    return expectations()
