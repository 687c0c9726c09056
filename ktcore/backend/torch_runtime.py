"""A device runtime over a torch device module (what torch puts under `torch.<device>`): streams, events, graphs.

Accelerators that torch drives share one Python surface; a backend hands in its module and adds what torch lacks, above
all the host callback.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from ktcore.backend.capabilities import Capabilities
from ktcore.backend.runtime import DeviceGraph, DeviceRuntime, Event, GraphMode, MemoryInfo, Stream


class TorchGraph(DeviceGraph):
    """A captured torch graph."""

    def __init__(self, graph: Any, runtime: TorchDeviceRuntime) -> None:
        self._graph = graph
        self._runtime = runtime

    def replay(self, stream: Stream) -> None:
        with self._runtime.use_stream(stream):
            self._graph.replay()


class TorchDeviceRuntime(DeviceRuntime):
    """One device behind a torch device module.

    Args:
        module: has Stream, Event, stream, synchronize, mem_get_info and get_device_properties.
        device_type: the type string of its torch devices.
        capabilities: what the live device can do.
        graph_type: name of the module's graph class; None when it has none that can be relied on.
    """

    def __init__(
        self, module: Any, device_type: str, index: int, capabilities: Capabilities, graph_type: str | None = None
    ) -> None:
        self._module = module
        self._device = torch.device(device_type, index)
        self._capabilities = capabilities
        self._graph_type = graph_type
        self.graph = GraphMode.NONE if graph_type is None else GraphMode.CAPTURE

    @property
    def device(self) -> torch.device:
        return self._device

    def capabilities(self) -> Capabilities:
        return self._capabilities

    def memory(self) -> MemoryInfo:
        free, total = self._module.mem_get_info(self._device.index)
        return MemoryInfo(int(free), int(total))

    def new_stream(self) -> Stream:
        return self._module.Stream(device=self._device)

    @contextmanager
    def use_stream(self, stream: Stream) -> Iterator[None]:
        with self._module.stream(stream):
            yield

    def record_event(self, stream: Stream) -> Event:
        event = self._module.Event()
        event.record(stream)
        return event

    def wait_event(self, stream: Stream, event: Event) -> None:
        stream.wait_event(event)

    def event_done(self, event: Event) -> bool:
        return bool(event.query())

    def synchronize(self, what: Stream | Event | None = None) -> None:
        if what is None:
            self._module.synchronize(self._device)
        else:
            what.synchronize()

    def pinned_buffer(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        # an ordinary tensor also when asked for in inference mode: threads outside of it write into it
        with torch.inference_mode(False):
            return torch.empty(shape, dtype=dtype, pin_memory=True)

    def copy_async(self, destination: torch.Tensor, source: torch.Tensor, stream: Stream) -> None:
        with self._module.stream(stream):
            destination.copy_(source, non_blocking=True)

    def capture(self, stream: Stream, work: Callable[[], None]) -> DeviceGraph:
        if self._graph_type is None:
            return super().capture(stream, work)
        graph = getattr(self._module, self._graph_type)()
        with self._module.graph(graph, stream=stream):
            work()
        return TorchGraph(graph, self)
