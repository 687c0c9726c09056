"""The ROCm backend: its implementations, and how a device is opened."""

from __future__ import annotations

from collections.abc import Sequence

from ktcore_triton.native.linear import TiledLinear
from ktcore_triton.operators import implementations

from ktcore.backend import Backend, Capabilities, Implementation
from ktcore.errors import BackendError
from ktcore_rocm.aiter import Aiter
from ktcore_rocm.native import HipBuild
from ktcore_rocm.runtime import RocmRuntime, torch_vendor
from ktcore_rocm.tuning import tuning


class RocmBackend(Backend):
    """The quantised product in HIP, and the shared Triton kernels."""

    def implementations(self) -> Sequence[Implementation]:
        builds: dict[str, HipBuild] = {}

        def build(device: Capabilities) -> HipBuild:
            arch = str(device.properties.get("arch", ""))
            return builds.setdefault(arch, HipBuild(arch))

        tiled = (TiledLinear("rocm", bits, build) for bits in (4, 8))
        return [*tiled, *implementations("rocm", tuning), Aiter("rocm", tuning)]

    def runtime(self, index: int = 0, threads: int | None = None) -> RocmRuntime:
        vendor = torch_vendor()
        count = vendor.device_count()
        if index >= count:
            raise BackendError(f"there is no device rocm:{index}; {count} found")
        return RocmRuntime(index, vendor)
