"""The host as a device: plain torch on the CPU, where all work is done when the call returns."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import psutil
import torch

from ktcore.backend.capabilities import Capabilities
from ktcore.backend.lane import Lane, ThreadLane
from ktcore.backend.runtime import DeviceRuntime, Event, HostCallbackMode, MemoryInfo, Stream


@dataclass(frozen=True)
class HostStream:
    """A stream without a queue: everything in it has already run."""

    number: int


@dataclass(frozen=True)
class HostEvent:
    """An event that has passed since it was recorded."""


class HostRuntime(DeviceRuntime):
    """Runtime of the CPU; host backends use or extend it.

    Args:
        capabilities: what the backend reports; a plain description when left out.
    """

    host_callback = HostCallbackMode.EAGER

    def __init__(self, capabilities: Capabilities | None = None) -> None:
        total = psutil.virtual_memory().total
        self._capabilities = capabilities or Capabilities("host", "host memory", total, live=True)
        self._streams = 0

    @property
    def device(self) -> torch.device:
        return torch.device("cpu")

    def capabilities(self) -> Capabilities:
        return self._capabilities

    def memory(self) -> MemoryInfo:
        memory = psutil.virtual_memory()
        return MemoryInfo(memory.available, memory.total)

    def new_stream(self) -> Stream:
        self._streams += 1
        return HostStream(self._streams)

    def new_lane(self) -> Lane:
        """A thread that runs this host's jobs for accelerators' streams."""
        return ThreadLane()

    @contextmanager
    def use_stream(self, stream: Stream) -> Iterator[None]:
        yield

    def record_event(self, stream: Stream) -> Event:
        return HostEvent()

    def wait_event(self, stream: Stream, event: Event) -> None:
        pass

    def event_done(self, event: Event) -> bool:
        return True

    def synchronize(self, what: Stream | Event | None = None) -> None:
        pass

    def pinned_buffer(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype)

    def copy_async(self, destination: torch.Tensor, source: torch.Tensor, stream: Stream) -> None:
        destination.copy_(source)

    def launch_host(self, stream: Stream, function: int, data: int) -> None:
        ctypes.CFUNCTYPE(None, ctypes.c_void_p)(function)(data)
