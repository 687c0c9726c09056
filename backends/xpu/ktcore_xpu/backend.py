"""The XPU backend: its implementations, and how a device is opened."""

from __future__ import annotations

from collections.abc import Sequence

from ktcore_triton.operators import implementations

from ktcore.backend import Backend, Implementation
from ktcore.errors import BackendError
from ktcore_xpu import sycl
from ktcore_xpu.onednn import OneDnnLinear
from ktcore_xpu.runtime import XpuRuntime, torch_vendor
from ktcore_xpu.tuning import tuning


class XpuBackend(Backend):
    """The shared Triton kernels over its devices, SYCL kernels of its own, and what installed packages bring."""

    def implementations(self) -> Sequence[Implementation]:
        return [*implementations("xpu", tuning), *sycl.implementations(), OneDnnLinear()]

    def runtime(self, index: int = 0, threads: int | None = None) -> XpuRuntime:
        vendor = torch_vendor()
        count = vendor.module.device_count()
        if index >= count:
            raise BackendError(f"there is no device xpu:{index}; {count} found")
        return XpuRuntime(index, vendor)
