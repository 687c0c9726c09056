"""The device runtime: torch's XPU module, without host callbacks and graphs."""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import Any

import torch

from ktcore.backend.runtime import Event, Stream
from ktcore.backend.torch_runtime import TorchDeviceRuntime
from ktcore_xpu.devices import live


@dataclass(frozen=True)
class XpuVendor:
    """What the runtime calls of the vendor; another one stands in where there is no device.

    Attributes:
        module: torch.xpu, or what has its surface.
        device_type: of the module's tensors.
    """

    module: Any
    device_type: str


def torch_vendor() -> XpuVendor:
    """The real one."""
    return XpuVendor(torch.xpu, "xpu")


class XpuRuntime(TorchDeviceRuntime):
    """One Intel GPU. Its graphs are beta and do not follow events to other streams, so none are offered."""

    def __init__(self, index: int, vendor: XpuVendor | None = None) -> None:
        vendor = vendor or torch_vendor()
        properties = vendor.module.get_device_properties(index)
        found = live(properties.name, properties.total_memory, properties.sub_group_sizes, bool(properties.has_fp64))
        super().__init__(vendor.module, vendor.device_type, index, found)
        self._streams: weakref.WeakSet[Any] = weakref.WeakSet()

    def new_stream(self) -> Stream:
        stream = super().new_stream()
        self._streams.add(stream)
        return stream

    def synchronize(self, what: Stream | Event | None = None) -> None:
        if what is not None:
            super().synchronize(what)
            return
        # device-wide synchronisation has crashed with oneAPI 2026.0 (pytorch/pytorch#187277); that of streams is safe
        for stream in (self._module.current_stream(self.device), *self._streams):
            stream.synchronize()
