"""Registers the Ascend NPU backend; importing this touches no driver and not torch_npu."""

from __future__ import annotations

import os
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

from ktcore.backend import API_VERSION, BackendSpec, Probe, hookimpl
from ktcore_npu.devices import DECLARED

TOOLKIT_VARIABLES = ("ASCEND_HOME_PATH", "ASCEND_TOOLKIT_HOME")
DRIVER = Path("/dev/davinci_manager")


def probe() -> Probe:
    """Looks for package, toolkit and driver by name first: importing torch_npu fails where CANN is missing."""
    missing = [reason for reason in (_package(), _toolkit(), _driver()) if reason]
    if missing:
        return Probe(False, "; ".join(missing))
    try:
        device = import_module("torch_npu").npu
    except (ImportError, OSError) as error:
        return Probe(False, f"torch_npu does not import: {error}; {_versions()}; source CANN's set_env.sh")
    count = device.device_count()
    if count == 0:
        return Probe(False, "torch_npu finds no device; see ASCEND_RT_VISIBLE_DEVICES")
    names = ", ".join(device.get_device_name(i) for i in range(count))
    return Probe(True, f"{names}, {_versions()}", devices=count)


@hookimpl
def ktcore_register_backends() -> list[BackendSpec]:
    """The one backend of this package."""
    return [
        BackendSpec(
            name="npu",
            api_version=API_VERSION,
            requirements="an Ascend 910B or 910C, its driver, CANN, and the torch_npu of the same version as torch",
            entry="ktcore_npu.backend:NpuBackend",
            probe=probe,
            declared=DECLARED,
        )
    ]


@hookimpl
def ktcore_conformance_expectations() -> object:
    """Precision of the operators."""
    from ktcore_npu import conformance

    return conformance.expectations()


def _versions() -> str:
    """torch_npu and torch go together in one version each, the last number of torch_npu's aside."""
    import torch

    try:
        return f"torch_npu {version('torch-npu')} with torch {torch.__version__}"
    except PackageNotFoundError:
        return f"torch_npu of unknown version with torch {torch.__version__}"


def _package() -> str | None:
    if find_spec("torch_npu") is not None:
        return None
    try:
        found = f"torch-npu {version('torch-npu')} is damaged"
    except PackageNotFoundError:
        found = "torch_npu is not installed"
    return f"{found}: install the torch-npu that matches torch's version"


def _toolkit() -> str | None:
    if any(os.environ.get(name) for name in TOOLKIT_VARIABLES):
        return None
    return f"CANN is not set up: install it and source its set_env.sh ({' or '.join(TOOLKIT_VARIABLES)} is not set)"


def _driver() -> str | None:
    return None if DRIVER.exists() else f"the Ascend driver is not loaded ({DRIVER} is missing)"
