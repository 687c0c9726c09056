"""Registers the CUDA backend; importing this touches no driver."""

from __future__ import annotations

from ktcore.backend import API_VERSION, BackendSpec, Probe, hookimpl
from ktcore_cuda.devices import DECLARED


def probe() -> Probe:
    """Asks torch, then the driver; a torch without CUDA is never made to initialise one."""
    import torch

    driver = _driver()
    if torch.version.hip is not None:
        return Probe(False, f"torch {torch.__version__} is built for ROCm: install a CUDA build of torch; {driver}")
    if torch.version.cuda is None:
        return Probe(False, f"torch {torch.__version__} is built without CUDA: install a CUDA build of torch; {driver}")
    count = torch.cuda.device_count()
    if count == 0:
        return Probe(False, f"torch {torch.__version__} finds no CUDA device: {driver}; see CUDA_VISIBLE_DEVICES")
    names = ", ".join(torch.cuda.get_device_name(i) for i in range(count))
    from ktcore_cuda.native import CudaBuild

    return Probe(True, f"{names}, CUDA {torch.version.cuda}; {CudaBuild().status()}", devices=count)


@hookimpl
def ktcore_register_backends() -> list[BackendSpec]:
    """The one backend of this package."""
    return [
        BackendSpec(
            name="cuda",
            api_version=API_VERSION,
            requirements="an NVIDIA GPU of compute capability 8.0 or later, its driver, and a CUDA build of torch",
            entry="ktcore_cuda.backend:CudaBackend",
            probe=probe,
            declared=DECLARED,
        )
    ]


@hookimpl
def ktcore_conformance_expectations() -> object:
    """Precision of the kernels."""
    from ktcore_cuda import conformance

    return conformance.expectations()


def _driver() -> str:
    import ctypes

    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return "no NVIDIA driver is installed (libcuda.so.1 does not load)"
    return "an NVIDIA driver is installed"
