"""The ROCm backend: its implementations, and how a device is opened."""

from __future__ import annotations

from collections.abc import Sequence

from ktcore.backend import Backend, Implementation
from ktcore.errors import BackendError
from ktcore_rocm.runtime import RocmRuntime, torch_vendor


class RocmBackend(Backend):
    """No implementations yet: the references run on its devices."""

    def implementations(self) -> Sequence[Implementation]:
        return []

    def runtime(self, index: int = 0, threads: int | None = None) -> RocmRuntime:
        vendor = torch_vendor()
        count = vendor.device_count()
        if index >= count:
            raise BackendError(f"there is no device rocm:{index}; {count} found")
        return RocmRuntime(index, vendor)
