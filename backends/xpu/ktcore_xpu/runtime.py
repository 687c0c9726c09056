"""The device runtime: torch's XPU module, without graphs; host callbacks by SYCL's host_task where asked for."""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from ktcore.backend import Capabilities, HostCallbackMode
from ktcore.backend.runtime import Event, Stream
from ktcore.backend.torch_runtime import TorchDeviceRuntime
from ktcore_xpu.devices import live
from ktcore_xpu.sycl.host import HostCalls

HOST_TASK = "KTCORE_XPU_HOST_TASK"
"""Set to 1, host work is queued by host_task, which has not been run on hardware yet, instead of ordered by events."""


@dataclass(frozen=True)
class XpuVendor:
    """What the runtime calls of the vendor; another one stands in where there is no device.

    Attributes:
        module: torch.xpu, or what has its surface.
        device_type: of the module's tensors.
        host_calls: makes what queues host functions on its streams; None: host work is ordered by events.
    """

    module: Any
    device_type: str
    host_calls: Callable[[], HostCalls] | None = None


def torch_vendor() -> XpuVendor:
    """The real one."""
    return XpuVendor(torch.xpu, "xpu", HostCalls if os.environ.get(HOST_TASK) == "1" else None)


class XpuRuntime(TorchDeviceRuntime):
    """One Intel GPU. Its graphs are beta and do not follow events to other streams, so none are offered."""

    def __init__(self, index: int, vendor: XpuVendor | None = None) -> None:
        vendor = vendor or torch_vendor()
        properties = vendor.module.get_device_properties(index)
        found = live(properties.name, properties.total_memory, properties.sub_group_sizes, bool(properties.has_fp64))
        self._host_calls = vendor.host_calls() if vendor.host_calls else None
        if self._host_calls is not None:
            self.host_callback = HostCallbackMode.EAGER
            found = _with_host_calls(found)
        super().__init__(vendor.module, vendor.device_type, index, found)
        self._streams: weakref.WeakSet[Any] = weakref.WeakSet()

    def new_stream(self) -> Stream:
        stream = super().new_stream()
        self._streams.add(stream)
        return stream

    def launch_host(self, stream: Stream, function: int, data: int) -> None:
        if self._host_calls is None:
            super().launch_host(stream, function, data)
        else:
            self._host_calls.launch(stream.sycl_queue, function, data)

    def synchronize(self, what: Stream | Event | None = None) -> None:
        if what is not None:
            super().synchronize(what)
            return
        # device-wide synchronisation has crashed with oneAPI 2026.0 (pytorch/pytorch#187277); that of streams is safe
        for stream in (self._module.current_stream(self.device), *self._streams):
            stream.synchronize()


def _with_host_calls(found: Capabilities) -> Capabilities:
    none = {feature for feature in found.features if feature.startswith("host_callback:")}
    return replace(found, features=(found.features - none) | {"host_callback:eager"})
