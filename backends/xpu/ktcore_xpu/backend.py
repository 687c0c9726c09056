"""The XPU backend: torch's XPU module as a device runtime, without host callbacks and graphs."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ktcore.backend import Backend, Implementation
from ktcore.backend.runtime import Event, Stream
from ktcore.backend.torch_runtime import TorchDeviceRuntime
from ktcore.errors import BackendError
from ktcore_xpu.devices import live


class XpuRuntime(TorchDeviceRuntime):
    """One Intel GPU. Its graphs are beta and do not follow events to other streams, so none are offered."""

    def __init__(self, index: int) -> None:
        properties = torch.xpu.get_device_properties(index)
        found = live(properties.name, properties.total_memory, properties.sub_group_sizes, bool(properties.has_fp64))
        super().__init__(torch.xpu, "xpu", index, found)

    def synchronize(self, what: Stream | Event | None = None) -> None:
        # device-wide synchronisation has crashed with oneAPI 2026.0 (pytorch/pytorch#187277); the stream's is safe
        super().synchronize(torch.xpu.current_stream(self.device) if what is None else what)


class XpuBackend(Backend):
    """No implementations yet: the references run on its devices."""

    def implementations(self) -> Sequence[Implementation]:
        return []

    def runtime(self, index: int = 0, threads: int | None = None) -> XpuRuntime:
        count = torch.xpu.device_count()
        if index >= count:
            raise BackendError(f"there is no device xpu:{index}; {count} found")
        return XpuRuntime(index)
