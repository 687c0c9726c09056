"""Registers the ROCm backend; importing this touches no driver."""

from __future__ import annotations

from pathlib import Path

from ktcore.backend import API_VERSION, BackendSpec, Probe, hookimpl
from ktcore_rocm.devices import DECLARED

KERNEL_DRIVER = Path("/dev/kfd")


def probe() -> Probe:
    """Asks torch, then the driver; a torch without ROCm is never made to initialise one."""
    import torch

    driver = f"the amdgpu driver is {'loaded' if KERNEL_DRIVER.exists() else 'not loaded'} ({KERNEL_DRIVER})"
    if torch.version.hip is None:
        return Probe(False, f"torch {torch.__version__} is built without ROCm: install a ROCm build of torch; {driver}")
    count = torch.cuda.device_count()
    if count == 0:
        return Probe(False, f"torch {torch.__version__} finds no ROCm device: {driver}; see HIP_VISIBLE_DEVICES")
    names = ", ".join(torch.cuda.get_device_name(i) for i in range(count))
    from ktcore_rocm.native import HipBuild

    kernels = HipBuild(torch.cuda.get_device_properties(0).gcnArchName.split(":")[0]).status()
    return Probe(True, f"{names}, ROCm {torch.version.hip}; {kernels}", devices=count)


@hookimpl
def ktcore_register_backends() -> list[BackendSpec]:
    """The one backend of this package."""
    return [
        BackendSpec(
            name="rocm",
            api_version=API_VERSION,
            requirements="an AMD GPU that ROCm supports, the amdgpu driver, and a ROCm build of torch",
            entry="ktcore_rocm.backend:RocmBackend",
            probe=probe,
            declared=DECLARED,
        )
    ]


@hookimpl
def ktcore_conformance_expectations() -> object:
    """Precision of the kernels."""
    from ktcore_rocm import conformance

    return conformance.expectations()
