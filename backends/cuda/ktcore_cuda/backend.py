"""The CUDA backend: its implementations, and how a device is opened."""

from __future__ import annotations

from collections.abc import Sequence

from ktcore_triton.operators import implementations

from ktcore.backend import Backend, Implementation
from ktcore.errors import BackendError
from ktcore_cuda.runtime import CudaRuntime, torch_vendor
from ktcore_cuda.w4a16 import CudaTiled


class CudaBackend(Backend):
    """The package's own CUDA kernels, and the shared Triton ones."""

    def implementations(self) -> Sequence[Implementation]:
        return [CudaTiled(4), CudaTiled(8), *implementations("cuda")]

    def runtime(self, index: int = 0, threads: int | None = None) -> CudaRuntime:
        vendor = torch_vendor()
        count = vendor.module.device_count()
        if index >= count:
            raise BackendError(f"there is no device cuda:{index}; {count} found")
        return CudaRuntime(index, vendor)
