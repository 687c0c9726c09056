"""The NPU backend: its implementations, and how a device is opened."""

from __future__ import annotations

from collections.abc import Sequence

from ktcore.backend import Backend, Implementation
from ktcore.errors import BackendError
from ktcore_npu.operators import implementations
from ktcore_npu.runtime import NpuRuntime
from ktcore_npu.vendor import torch_vendor


class NpuBackend(Backend):
    """torch_npu's fused operators over its devices."""

    def implementations(self) -> Sequence[Implementation]:
        return implementations()

    def runtime(self, index: int = 0, threads: int | None = None) -> NpuRuntime:
        vendor = torch_vendor()
        count = vendor.module.device_count()
        if index >= count:
            raise BackendError(f"there is no device npu:{index}; {count} found")
        return NpuRuntime(index, vendor)
