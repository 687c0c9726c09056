"""The device runtime that NVIDIA's and AMD's backends share: torch drives both under the same names, and their drivers
queue host functions by functions of one signature."""

from __future__ import annotations

import ctypes
from typing import Any

from ktcore.backend import Capabilities, HostCallbackMode
from ktcore.backend.runtime import Stream
from ktcore.backend.torch_runtime import TorchDeviceRuntime
from ktcore.errors import BackendError


class NativeRuntime(TorchDeviceRuntime):
    """One device, whose decode steps can be captured with their host functions.

    Args:
        module, device_type, index, capabilities: as of `TorchDeviceRuntime`.
        driver: the library that has `launch`.
        launch: name of its function (stream, function, argument) -> error, which also works within a capture.
    """

    host_callback = HostCallbackMode.CAPTURABLE

    def __init__(
        self, module: Any, device_type: str, index: int, capabilities: Capabilities, driver: Any, launch: str
    ) -> None:
        super().__init__(module, device_type, index, capabilities, "CUDAGraph")
        self._launch_name = launch
        self._launch = getattr(driver, launch)
        self._launch.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p]

    def current_handle(self) -> int:
        """The driver's handle of the current stream, for launches past torch."""
        return int(self._module.current_stream(self.device).cuda_stream)

    def launch_host(self, stream: Stream, function: int, data: int) -> None:
        error = self._launch(stream.cuda_stream, function, data)
        if error:
            raise BackendError(f"{self._launch_name} returned {error} on {self.device}")
