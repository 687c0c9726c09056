"""The CUDA backend: its implementations, and how a device is opened."""

from __future__ import annotations

from collections.abc import Sequence

from ktcore_triton.native.linear import TiledLinear
from ktcore_triton.operators import implementations

from ktcore.backend import Backend, Implementation
from ktcore.errors import BackendError
from ktcore_cuda.flash_mla import FlashMla
from ktcore_cuda.flashinfer import FlashInferMla
from ktcore_cuda.native import CudaBuild
from ktcore_cuda.runtime import CudaRuntime, torch_vendor
from ktcore_cuda.tuning import tuning


class CudaBackend(Backend):
    """The quantised product in CUDA C++, and the shared Triton kernels."""

    def implementations(self) -> Sequence[Implementation]:
        build = CudaBuild()
        tiled = (TiledLinear("cuda", bits, lambda device: build) for bits in (4, 8))
        optional = FlashMla("cuda", tuning), FlashInferMla("cuda", tuning)
        return [*tiled, *implementations("cuda", tuning), *optional]

    def runtime(self, index: int = 0, threads: int | None = None) -> CudaRuntime:
        vendor = torch_vendor()
        count = vendor.module.device_count()
        if index >= count:
            raise BackendError(f"there is no device cuda:{index}; {count} found")
        return CudaRuntime(index, vendor)
