"""Host runtimes whose copies are late on purpose, right and wrong ones, so that order shows without a device."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from ktcore.backend import HostCallbackMode

from .plain import PlainRuntime


@dataclass
class LazyStream:
    """Work that has not run yet."""

    queue: list[Callable[[], None]] = field(default_factory=list)

    def run(self, upto: int | None = None) -> None:
        """Run the oldest entries."""
        count = len(self.queue) if upto is None else min(upto, len(self.queue))
        ready, self.queue[:] = self.queue[:count], self.queue[count:]
        for work in ready:
            work()


@dataclass
class LazyEvent:
    """A flag at the end of what a stream holds."""

    stream: LazyStream
    done: bool = False


class LazyRuntime(PlainRuntime):
    """Copies and callbacks wait in their stream until somebody waits for them."""

    def __init__(self) -> None:
        super().__init__()
        self._lazy: list[LazyStream] = []

    def new_stream(self) -> Any:
        self._lazy.append(LazyStream())
        return self._lazy[-1]

    def use_stream(self, stream: Any) -> Any:
        stream.run()
        return super().use_stream(stream)

    def copy_async(self, destination: torch.Tensor, source: torch.Tensor, stream: Any) -> None:
        stream.queue.append(lambda: destination.copy_(source))

    def record_event(self, stream: Any) -> Any:
        event = LazyEvent(stream)
        stream.queue.append(lambda: setattr(event, "done", True))
        return event

    def wait_event(self, stream: Any, event: Any) -> None:
        stream.queue.append(lambda: None if event.done else event.stream.run())

    def event_done(self, event: Any) -> bool:
        event.stream.run()
        return bool(event.done)

    def synchronize(self, what: Any = None) -> None:
        streams = self._lazy if what is None else [what.stream if isinstance(what, LazyEvent) else what]
        for stream in streams:
            stream.run()

    def launch_host(self, stream: Any, function: int, data: int) -> None:
        stream.queue.append(lambda: ctypes.CFUNCTYPE(None, ctypes.c_void_p)(function)(data))


CLEAN = LazyRuntime
assert LazyRuntime.host_callback is HostCallbackMode.EAGER, "callbacks are part of what is tested"


class NoWait(LazyRuntime):
    """A stream never waits for another."""

    def wait_event(self, stream: Any, event: Any) -> None:
        pass


class QuickSynchronize(LazyRuntime):
    """Comes back with the newest entry still to do."""

    def synchronize(self, what: Any = None) -> None:
        if isinstance(what, LazyStream):
            what.run(len(what.queue) - 1)
        else:
            super().synchronize(what)


class EarlyCallback(LazyRuntime):
    """Calls the host at once."""

    def launch_host(self, stream: Any, function: int, data: int) -> None:
        ctypes.CFUNCTYPE(None, ctypes.c_void_p)(function)(data)


class LeakyPinned(PlainRuntime):
    """Keeps every pinned buffer."""

    def __init__(self) -> None:
        super().__init__()
        self._kept: list[torch.Tensor] = []

    def pinned_buffer(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        self._kept.append(super().pinned_buffer(shape, dtype))
        return self._kept[-1]


class SharedPinned(PlainRuntime):
    """Gives the same memory to all who ask for the same shape."""

    def __init__(self) -> None:
        super().__init__()
        self._by_shape: dict[Any, torch.Tensor] = {}

    def pinned_buffer(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        return self._by_shape.setdefault((shape, dtype), super().pinned_buffer(shape, dtype))
