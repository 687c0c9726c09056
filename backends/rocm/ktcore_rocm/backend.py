"""The ROCm backend: torch drives AMD devices under its CUDA names; the host function comes from the HIP runtime."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch

from ktcore.backend import Backend, HostCallbackMode, Implementation
from ktcore.backend.runtime import Stream
from ktcore.backend.torch_runtime import TorchDeviceRuntime
from ktcore.errors import BackendError
from ktcore_rocm.devices import live


class RocmRuntime(TorchDeviceRuntime):
    """One AMD device; torch calls it "cuda" too."""

    host_callback = HostCallbackMode.CAPTURABLE

    def __init__(self, index: int) -> None:
        properties = torch.cuda.get_device_properties(index)
        found = live(properties.name, properties.total_memory, properties.gcnArchName, properties.warp_size)
        super().__init__(torch.cuda, "cuda", index, found, "CUDAGraph")
        self._launch = _hip_runtime().hipLaunchHostFunc
        self._launch.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p]

    def launch_host(self, stream: Stream, function: int, data: int) -> None:
        error = self._launch(stream.cuda_stream, function, data)
        if error:
            raise BackendError(f"hipLaunchHostFunc returned {error} on {self.device}")


class RocmBackend(Backend):
    """No implementations yet: the references run on its devices."""

    def implementations(self) -> Sequence[Implementation]:
        return []

    def runtime(self, index: int = 0, threads: int | None = None) -> RocmRuntime:
        count = torch.cuda.device_count()
        if torch.version.hip is None or index >= count:
            raise BackendError(f"there is no device rocm:{index}; {count if torch.version.hip else 0} found")
        return RocmRuntime(index)


def _hip_runtime() -> ctypes.CDLL:
    """The library that torch has already loaded; a second copy would not know its streams."""
    with open("/proc/self/maps", encoding="utf-8") as maps:
        for line in maps:
            path = line.rstrip().partition("/")[2]
            if "libamdhip64" in path:
                return ctypes.CDLL(f"/{path}")
    raise BackendError("torch has loaded no HIP runtime (libamdhip64)", "reinstall the ROCm build of torch")
