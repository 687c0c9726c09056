"""The device runtime: torch's CUDA module, with the driver's host function on top."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from ktcore.backend import HostCallbackMode
from ktcore.backend.runtime import Stream
from ktcore.backend.torch_runtime import TorchDeviceRuntime
from ktcore.errors import BackendError
from ktcore_cuda.devices import live


@dataclass(frozen=True)
class CudaVendor:
    """What the runtime calls of the vendor; another one stands in where there is no device.

    Attributes:
        module: torch.cuda, or what has its surface.
        device_type: of the module's tensors.
        driver: loads the driver's library.
    """

    module: Any
    device_type: str
    driver: Callable[[], Any]


def torch_vendor() -> CudaVendor:
    """The real ones: the driver's own entry point, whatever runtime library torch carries."""
    return CudaVendor(torch.cuda, "cuda", lambda: ctypes.CDLL("libcuda.so.1"))


class CudaRuntime(TorchDeviceRuntime):
    """One CUDA device."""

    host_callback = HostCallbackMode.CAPTURABLE

    def __init__(self, index: int, vendor: CudaVendor | None = None) -> None:
        vendor = vendor or torch_vendor()
        properties = vendor.module.get_device_properties(index)
        processors = int(properties.multi_processor_count)
        found = live(properties.name, properties.total_memory, properties.major, properties.minor, processors)
        super().__init__(vendor.module, vendor.device_type, index, found, "CUDAGraph")
        self._launch = vendor.driver().cuLaunchHostFunc
        self._launch.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p]

    def current_handle(self) -> int:
        """The driver's handle of the current stream, for launches past torch."""
        return int(self._module.current_stream(self.device).cuda_stream)

    def launch_host(self, stream: Stream, function: int, data: int) -> None:
        error = self._launch(stream.cuda_stream, function, data)
        if error:
            raise BackendError(f"cuLaunchHostFunc returned {error} on {self.device}")
