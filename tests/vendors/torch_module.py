"""The surface of torch.cuda and torch.xpu over the simulated device, refusing what the real modules refuse.

Semantics are those of PyTorch's documentation (torch.cuda: Stream, Event, CUDAGraph, graph, mem_get_info): a capture
needs a stream that is not the default one, an event must be recorded before it is waited for, a graph is replayed on
the current stream and only after it was captured.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch
from ktcore_sim.runtime import SimRuntime, SimStream


class Module:
    """One vendor's device module with one device.

    Args:
        runtime: of the simulated device.
        properties: what `get_device_properties` reports.
        handle: name of the attribute of a stream that holds its address ("cuda_stream").
        graph_type: name of the graph class; "" for none.
    """

    def __init__(self, runtime: SimRuntime, properties: SimpleNamespace, handle: str, graph_type: str = "") -> None:
        self.runtime = runtime
        self.native: Any = runtime._native
        self.properties = properties
        module = self

        class Stream:
            def __init__(self, device: torch.device | None = None, priority: int = 0, *, made: Any = None) -> None:
                assert device is None or torch.device(device) == runtime.device, device
                self.sim: SimStream = made if made is not None else runtime.new_stream()
                setattr(self, handle, address(self.sim))

            def wait_event(self, event: Event) -> None:
                assert event.sim is not None, "an event is waited for before it is recorded"
                runtime.wait_event(self.sim, event.sim)

            def synchronize(self) -> None:
                runtime.synchronize(self.sim)

        class Event:
            def __init__(self, enable_timing: bool = False) -> None:
                self.sim: Any = None

            def record(self, stream: Stream | None = None) -> None:
                self.sim = runtime.record_event((stream or module.current_stream()).sim)

            def query(self) -> bool:
                return self.sim is None or runtime.event_done(self.sim)

            def synchronize(self) -> None:
                if self.sim is not None:
                    runtime.synchronize(self.sim)

        class Graph:
            def __init__(self) -> None:
                self.made: Any = None

            def replay(self) -> None:
                assert self.made is not None, "replay without a preceding successful capture"
                current = module.current_stream().sim
                self.made.replay(current.device, current.id)

        self.Stream, self.Event = Stream, Event
        if graph_type:
            setattr(self, graph_type, Graph)

    def device_count(self) -> int:
        """One."""
        return 1

    def get_device_name(self, index: int) -> str:
        """As the properties say."""
        return str(self.properties.name)

    def get_device_properties(self, index: int | torch.device) -> SimpleNamespace:
        """Of the only device."""
        return self.properties

    def mem_get_info(self, index: int | None = None) -> tuple[int, int]:
        """Free and total bytes."""
        found = self.runtime.memory()
        return found.free, found.total

    def synchronize(self, device: Any = None) -> None:
        """Of the whole device."""
        self.runtime.synchronize()

    def current_stream(self, device: Any = None) -> Any:
        """The one that `stream` has made current."""
        index = self.runtime.device.index
        return self.Stream(made=SimStream(index, self.native.current_stream(index)))

    @contextmanager
    def stream(self, stream: Any) -> Iterator[None]:
        """Make a stream current."""
        with self.runtime.use_stream(stream.sim):
            yield

    @contextmanager
    def graph(self, graph: Any, pool: Any = None, stream: Any = None) -> Iterator[None]:
        """Capture what is launched within."""
        assert stream is not None, "the default stream cannot be captured"
        assert stream.sim.id != 0, "the default stream cannot be captured"
        made = self.native.Graph(stream.sim.device, stream.sim.id)
        try:
            with self.stream(stream):
                yield
        except BaseException:
            made.end(False)
            raise
        made.end(True)
        graph.made = made


def address(stream: SimStream) -> int:
    """A stream's address, as a C library gets it: never 0, which is the default stream of a driver."""
    return 0x5000_0000 + (stream.device << 20) + stream.id


class HostFunctions:
    """The driver's C function that puts a host function on a stream (`cuLaunchHostFunc`, `hipLaunchHostFunc`).

    It takes the stream's address, the function's and its argument, and returns 0, or 1 (invalid value) for an address
    that is no stream's or a function that is null.
    """

    argtypes: Any = None

    def __init__(self, runtime: SimRuntime) -> None:
        self._native: Any = runtime._native
        self._runtime = runtime
        self.calls = 0

    def __call__(self, stream: int, function: int, data: int) -> int:
        device, number = (stream - 0x5000_0000) >> 20, (stream - 0x5000_0000) & 0xFFFFF
        if device != self._runtime.device.index or not function or self.argtypes is None:
            return 1
        self.calls += 1
        self._native.launch_host(device, number, function, data, True)
        return 0
