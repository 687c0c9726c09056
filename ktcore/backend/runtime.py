"""The device runtime: all that hybrid execution needs of a device, and all it may use."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from enum import Enum
from typing import Any

import torch

from ktcore.backend.capabilities import Capabilities

Stream = Any
"""A queue of device work in order; opaque to the core."""
Event = Any
"""A mark in a stream; opaque to the core."""


class HostCallbackMode(Enum):
    """How a stream can call the host in order with its other work."""

    NONE = "none"
    EAGER = "eager"
    CAPTURABLE = "capturable"


class GraphMode(Enum):
    """Whether a sequence of launches can be recorded and replayed."""

    NONE = "none"
    CAPTURE = "capture"
    CAPTURE_UPDATE = "capture+update"


@dataclass(frozen=True)
class MemoryInfo:
    """Device memory in bytes."""

    free: int
    total: int


class DeviceGraph(ABC):
    """Recorded launches; addresses and shapes are those of the recording."""

    @abstractmethod
    def replay(self, stream: Stream) -> None:
        """Launch the recording again on `stream`."""


class DeviceRuntime(ABC):
    """One device of one backend. Engines own runtimes; a runtime keeps no process-wide state."""

    host_callback: HostCallbackMode = HostCallbackMode.NONE
    graph: GraphMode = GraphMode.NONE

    @property
    @abstractmethod
    def device(self) -> torch.device:
        """The torch device that tensors of this runtime live on."""

    @abstractmethod
    def capabilities(self) -> Capabilities:
        """What the live device can do."""

    @abstractmethod
    def memory(self) -> MemoryInfo:
        """Free and total device memory now."""

    @abstractmethod
    def new_stream(self) -> Stream:
        """A stream of this device."""

    @abstractmethod
    def use_stream(self, stream: Stream) -> AbstractContextManager[None]:
        """Within the context, torch work on this device goes to `stream`."""

    @abstractmethod
    def record_event(self, stream: Stream) -> Event:
        """An event after all work that `stream` holds now."""

    @abstractmethod
    def wait_event(self, stream: Stream, event: Event) -> None:
        """Later work of `stream` starts after `event`; the host does not wait."""

    @abstractmethod
    def event_done(self, event: Event) -> bool:
        """Whether the event has passed, without waiting."""

    @abstractmethod
    def synchronize(self, what: Stream | Event | None = None) -> None:
        """Block the host until the stream or event (default: the device) is done; raises errors that surface late."""

    @abstractmethod
    def pinned_buffer(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """Host memory that `copy_async` can move without a staging copy."""

    @abstractmethod
    def copy_async(self, destination: torch.Tensor, source: torch.Tensor, stream: Stream) -> None:
        """Copy between a pinned host buffer and device memory in stream order."""

    def launch_host(self, stream: Stream, function: int, data: int) -> None:
        """Call the C function `void (*)(void *)` at address `function` with `data`, on a host thread in stream order.

        Plain addresses, since a captured graph calls them again at every replay: both must live as long as the graph.
        The function must not throw, must not use the device, and must not wait for a thread that waits for the device.

        Raises:
            NotImplementedError: `host_callback` is NONE.
        """
        raise NotImplementedError(f"{type(self).__name__} has no host callbacks")

    def capture(self, stream: Stream, work: Callable[[], None]) -> DeviceGraph:
        """Record what `work` launches on `stream` (and on streams that follow it by events) without running it.

        Raises:
            NotImplementedError: `graph` is NONE.
        """
        raise NotImplementedError(f"{type(self).__name__} has no graphs")

    def close(self) -> None:  # noqa: B027 - most runtimes hold nothing
        """Release what the runtime holds; calls after it are errors."""
