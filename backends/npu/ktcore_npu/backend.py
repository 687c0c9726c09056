"""The NPU backend: torch.npu as a device runtime, with host functions from the ACL runtime."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Sequence
from importlib import import_module
from typing import Any

from ktcore.backend import Backend, HostCallbackMode, Implementation
from ktcore.backend.runtime import Stream
from ktcore.backend.torch_runtime import TorchDeviceRuntime
from ktcore.errors import BackendError
from ktcore_npu.devices import live


class NpuRuntime(TorchDeviceRuntime):
    """One Ascend device.

    torch_npu puts a task queue between Python and the stream, which raw calls on the stream's handle would overtake.
    With TASK_QUEUE_ENABLE=0 there is no queue; host callbacks are offered only then.
    """

    def __init__(self, module: Any, index: int, queued: bool) -> None:
        properties = module.get_device_properties(index)
        super().__init__(module, "npu", index, live(properties.name, properties.total_memory), "NPUGraph")
        launch = None if queued else getattr(_acl(), "aclrtLaunchHostFunc", None)
        self._launch = launch
        if launch is not None:
            launch.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p]
            self.host_callback = HostCallbackMode.CAPTURABLE

    def launch_host(self, stream: Stream, function: int, data: int) -> None:
        if self._launch is None:
            raise NotImplementedError("host functions need TASK_QUEUE_ENABLE=0 and a CANN with aclrtLaunchHostFunc")
        error = self._launch(stream.npu_stream, function, data)
        if error:
            raise BackendError(f"aclrtLaunchHostFunc returned {error} on {self.device}")


class NpuBackend(Backend):
    """No implementations yet: the references run on its devices."""

    def implementations(self) -> Sequence[Implementation]:
        return []

    def runtime(self, index: int = 0, threads: int | None = None) -> NpuRuntime:
        module = import_module("torch_npu").npu
        count = module.device_count()
        if index >= count:
            raise BackendError(f"there is no device npu:{index}; {count} found")
        return NpuRuntime(module, index, queued=os.environ.get("TASK_QUEUE_ENABLE", "1") != "0")


def _acl() -> ctypes.CDLL:
    try:
        return ctypes.CDLL("libascendcl.so")
    except OSError as error:
        raise BackendError(f"the ACL runtime does not load: {error}", "source CANN's set_env.sh") from error
