"""The ROCm backend: its implementations, and how a device is opened."""

from __future__ import annotations

from collections.abc import Sequence

from ktcore_triton.operators import implementations

from ktcore.backend import Backend, Implementation
from ktcore.errors import BackendError
from ktcore_rocm.runtime import RocmRuntime, torch_vendor


class RocmBackend(Backend):
    """The shared Triton kernels over its devices."""

    def implementations(self) -> Sequence[Implementation]:
        return implementations("rocm")

    def runtime(self, index: int = 0, threads: int | None = None) -> RocmRuntime:
        vendor = torch_vendor()
        count = vendor.device_count()
        if index >= count:
            raise BackendError(f"there is no device rocm:{index}; {count} found")
        return RocmRuntime(index, vendor)
