"""Registers the XPU backend; importing this touches no driver."""

from __future__ import annotations

from ktcore.backend import API_VERSION, BackendSpec, Probe, hookimpl
from ktcore_xpu.devices import DECLARED


def probe() -> Probe:
    """Asks torch, then the driver; a torch without XPU support has the module too, so its version string decides."""
    import torch

    driver = _driver()
    if getattr(torch.version, "xpu", None) is None:
        return Probe(False, f"torch {torch.__version__} is built without XPU: install an XPU build of torch; {driver}")
    count = torch.xpu.device_count()
    if count == 0:
        return Probe(False, f"torch {torch.__version__} finds no XPU device: {driver}; see ZE_AFFINITY_MASK")
    names = ", ".join(torch.xpu.get_device_name(i) for i in range(count))
    return Probe(True, f"{names}, XPU {torch.version.xpu}", devices=count)


@hookimpl
def ktcore_register_backends() -> list[BackendSpec]:
    """The one backend of this package."""
    return [
        BackendSpec(
            name="xpu",
            api_version=API_VERSION,
            requirements="an Intel Arc or Data Center GPU Max, its Level Zero driver, and an XPU build of torch",
            entry="ktcore_xpu.backend:XpuBackend",
            probe=probe,
            declared=DECLARED,
        )
    ]


@hookimpl
def ktcore_conformance_expectations() -> object:
    """Precision of the kernels."""
    from ktcore_xpu import conformance

    return conformance.expectations()


def _driver() -> str:
    import ctypes

    try:
        ctypes.CDLL("libze_loader.so.1")
    except OSError:
        return "the Level Zero loader is not installed (libze_loader.so.1 does not load)"
    return "the Level Zero loader is installed"
