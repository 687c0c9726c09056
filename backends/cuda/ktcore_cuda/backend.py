"""The CUDA backend: torch's CUDA module as a device runtime, with the driver's host function on top."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch

from ktcore.backend import Backend, HostCallbackMode, Implementation
from ktcore.backend.runtime import Stream
from ktcore.backend.torch_runtime import TorchDeviceRuntime
from ktcore.errors import BackendError
from ktcore_cuda.devices import live


class CudaRuntime(TorchDeviceRuntime):
    """One CUDA device."""

    host_callback = HostCallbackMode.CAPTURABLE

    def __init__(self, index: int) -> None:
        properties = torch.cuda.get_device_properties(index)
        found = live(properties.name, properties.total_memory, properties.major, properties.minor)
        super().__init__(torch.cuda, "cuda", index, found, "CUDAGraph")
        # the driver's own entry point, whatever runtime library torch carries
        self._launch = ctypes.CDLL("libcuda.so.1").cuLaunchHostFunc
        self._launch.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p]

    def launch_host(self, stream: Stream, function: int, data: int) -> None:
        error = self._launch(stream.cuda_stream, function, data)
        if error:
            raise BackendError(f"cuLaunchHostFunc returned {error} on {self.device}")


class CudaBackend(Backend):
    """No implementations yet: the references run on its devices."""

    def implementations(self) -> Sequence[Implementation]:
        return []

    def runtime(self, index: int = 0, threads: int | None = None) -> CudaRuntime:
        count = torch.cuda.device_count()
        if index >= count:
            raise BackendError(f"there is no device cuda:{index}; {count} found")
        return CudaRuntime(index)
