"""The device runtime over the native half: streams, events, pinned buffers, host functions, graphs, counters."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from ktcore.backend import Capabilities, DeviceGraph, DeviceRuntime, GraphMode, HostCallbackMode, MemoryInfo
from ktcore.backend.runtime import Event, Stream
from ktcore.errors import BackendError
from ktcore_sim.capabilities import describe
from ktcore_sim.native import load_native
from ktcore_sim.options import SimOptions


@dataclass(frozen=True)
class SimStream:
    """A stream: the device's number, and the native stream's."""

    device: int
    id: int


@dataclass(frozen=True)
class Counts:
    """What a device did since its runtime was opened.

    Attributes:
        launches: kernels and torch operators put on its streams.
        blocked: times that the host waited for it.
        fallbacks: torch operators that it handed to the host, by name.
    """

    launches: int
    blocked: int
    host_calls: int
    fallbacks: dict[str, int]


@dataclass(frozen=True)
class Held:
    """What is in use on a device, for leak checks: bytes and numbers of things."""

    bytes: int
    allocations: int
    streams: int
    graphs: int
    pinned_bytes: int


class SimGraph(DeviceGraph):
    """A recording; keeps the memory that it replays into."""

    def __init__(self, graph: Any) -> None:
        self._graph = graph

    @property
    def launches(self) -> int:
        """How many launches a replay makes."""
        return int(self._graph.launches)

    def replay(self, stream: Stream) -> None:
        self._graph.replay(stream.device, stream.id)


class SimRuntime(DeviceRuntime):
    """One simulated device. Two runtimes of one device share its memory; streams and delays are each one's own.

    Args:
        options: read from the environment when left out.

    Raises:
        BackendError: there is no such device, or the native half does not load.
    """

    def __init__(self, index: int = 0, options: SimOptions | None = None) -> None:
        self.options = options or SimOptions.from_environment()
        native = self._native = load_native()
        if not 0 <= index < native.device_count():
            raise BackendError(
                f"there is no device sim:{index}; there are {native.device_count()}", "set KTCORE_SIM_DEVICES for more"
            )
        self._index = index
        self._streams: list[SimStream] = []
        self._closed = False
        self.host_callback = self.options.host_callback
        self.graph = self.options.graph
        native.set_cap(index, self.options.memory)
        native.set_timing(index, 0, *self._timing(0))
        native.count_host_touches(self.options.host_touch == "count")
        self._before = native.counters(index)

    @property
    def device(self) -> torch.device:
        return torch.device("sim", self._index)

    def capabilities(self) -> Capabilities:
        return describe(self.options, live=True)

    def memory(self) -> MemoryInfo:
        held = self._native.memory(self._index)
        return MemoryInfo(max(0, held["cap"] - held["live"]), held["cap"])

    def peak_memory(self, reset: bool = False) -> int:
        """Most bytes that lived at once since the last reset."""
        peak = int(self._native.memory(self._index)["peak"])
        if reset:
            self._native.reset_peak(self._index)
        return peak

    def new_stream(self) -> Stream:
        self._open()
        stream = SimStream(self._index, self._native.new_stream(self._index, *self._timing(len(self._streams) + 1)))
        self._streams.append(stream)
        return stream

    @contextmanager
    def use_stream(self, stream: Stream) -> Iterator[None]:
        native = self._native
        device, before = native.current_device(), native.current_stream(stream.device)
        native.set_device(stream.device)
        native.set_stream(stream.device, stream.id)
        try:
            yield
        finally:
            native.set_stream(stream.device, before)
            native.set_device(device)

    def record_event(self, stream: Stream) -> Event:
        event = self._native.Event()
        event.record(stream.device, stream.id)
        return event

    def wait_event(self, stream: Stream, event: Event) -> None:
        event.make_wait(stream.device, stream.id)

    def event_done(self, event: Event) -> bool:
        return bool(event.query())

    def synchronize(self, what: Stream | Event | None = None) -> None:
        if what is None:
            self._native.synchronize(self._index)
        elif isinstance(what, SimStream):
            self._native.sync_stream(what.device, what.id)
        else:
            what.synchronize()

    def pinned_buffer(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        self._open()
        # an ordinary tensor also when asked for in inference mode: threads outside of it write into it
        with torch.inference_mode(False):
            return torch.empty(shape, dtype=dtype, pin_memory=True)

    def copy_async(self, destination: torch.Tensor, source: torch.Tensor, stream: Stream) -> None:
        self._native.copy_async(destination, source, stream.device, stream.id)

    def launch_host(self, stream: Stream, function: int, data: int) -> None:
        if self.host_callback is HostCallbackMode.NONE:
            super().launch_host(stream, function, data)
        self._native.launch_host(
            stream.device, stream.id, function, data, self.host_callback is HostCallbackMode.CAPTURABLE
        )

    def capture(self, stream: Stream, work: Callable[[], None]) -> DeviceGraph:
        if self.graph is GraphMode.NONE:
            return super().capture(stream, work)
        graph = self._native.Graph(stream.device, stream.id)
        try:
            with self.use_stream(stream):
                work()
        except BaseException:
            graph.end(False)
            raise
        graph.end(True)
        return SimGraph(graph)

    def launch_python(
        self, stream: Stream, function: Callable[..., object], tensors: Sequence[torch.Tensor], name: str
    ) -> None:
        """A kernel written in Python: `function(*tensors)` on the stream's own thread when its turn comes.

        Tensors of the device arrive as CPU tensors over the same memory, to be read and written there; what it raises
        surfaces late, and a graph runs it at every replay.

        Raises:
            RuntimeError: a tensor of another device, or of the host without being pinned.
        """
        self._native.launch_python(stream.device, stream.id, function, list(tensors), name)

    def run_all_on_device(self, on: bool = True) -> None:
        """Whether torch operators outside of the list run on streams too, for all devices of the process.

        For devices that bring no kernels of their own but torch's, as a stand-in for a vendor's. Operators whose
        results have sizes that depend on data still go to the host, are counted, and wait.
        """
        self._native.run_all_on_device(on)

    def sleep(self, stream: Stream, seconds: float) -> None:
        """The stream pauses when it gets here: a layer's worth of device time, say."""
        self._native.sleep(stream.device, stream.id, seconds)

    def fail(self, stream: Stream, reason: str) -> None:
        """Work that fails when the stream gets here; the host learns of it at the next synchronising call."""
        self._native.fail(stream.device, stream.id, reason)

    def copy_bytes(self, to: int, source: int, count: int, stream: Stream) -> None:
        """Copy by address in stream order, as a driver does: nothing is checked before it runs."""
        self._native.copy_bytes(stream.device, stream.id, to, source, count)

    def fill_bytes(self, to: int, value: int, count: int, stream: Stream) -> None:
        """Fill by address in stream order; nothing is checked before it runs."""
        self._native.fill_bytes(stream.device, stream.id, to, value, count)

    def drawn_delay_us(self, stream: Stream) -> float:
        """Sum of the delays that the stream's tasks have drawn so far: a function of the seed and their number."""
        return float(self._native.drawn_us(stream.device, stream.id))

    def fallback_count(self) -> int:
        """Torch operators that the device handed to the host since this runtime was opened."""
        return sum(self.counts().fallbacks.values())

    def fallback_names(self) -> dict[str, int]:
        """The same, by operator."""
        return self.counts().fallbacks

    def host_touches(self) -> int:
        """Host accesses to device memory in this process; above 0 only with `host_touch` "count"."""
        return int(self._native.host_touches())

    def counts(self) -> Counts:
        """What the device did since this runtime was opened."""
        now, before = self._native.counters(self._index), self._before
        found = {name: n - before["fallbacks"].get(name, 0) for name, n in now["fallbacks"].items()}
        return Counts(
            launches=now["launches"] - before["launches"],
            blocked=now["blocked"] - before["blocked"],
            host_calls=now["host_calls"] - before["host_calls"],
            fallbacks={name: n for name, n in found.items() if n},
        )

    def held(self) -> Held:
        """What is in use on the device now, by anybody in this process. Waits for its streams first."""
        self._native.synchronize(self._index)
        memory, counters = self._native.memory(self._index), self._native.counters(self._index)
        return Held(
            bytes=memory["live"],
            allocations=memory["blocks"],
            streams=counters["streams"],
            graphs=counters["graphs"],
            pinned_bytes=self._native.pinned_bytes(),
        )

    def close(self) -> None:
        """Wait for this runtime's streams and end their threads.

        Raises:
            RuntimeError: an error that surfaced late and that nobody has asked for.
        """
        if self._closed:
            return
        self._closed = True
        while self._streams:
            stream = self._streams.pop()
            self._native.destroy_stream(stream.device, stream.id)
        self._native.synchronize(self._index)

    def _open(self) -> None:
        if self._closed:
            raise BackendError(f"the runtime of {self.device} is closed")

    def _timing(self, number: int) -> tuple[int, float, float]:
        # streams of one seed draw different delays, the same ones in every process
        seed = (self.options.seed * 1_000_003 + self._index * 1009 + number) % 2**64
        return seed, self.options.delay_us, self.options.latency_us
