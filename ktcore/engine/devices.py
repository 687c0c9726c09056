"""The devices of one engine: their runtimes, the stream that each computes on, and the hand-offs between them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

from ktcore.backend.runtime import DeviceRuntime, Stream
from ktcore.engine.handoff import Experts, HandOff
from ktcore.engine.lane import HostLane


class Devices:
    """Opens runtimes on first use and closes all of them; an engine has its own.

    Args:
        open_runtime: device name to an open runtime (`Registry.runtime`).
    """

    def __init__(self, open_runtime: Callable[[str], DeviceRuntime]) -> None:
        self._open = open_runtime
        self._runtimes: dict[str, DeviceRuntime] = {}
        self._streams: dict[str, Stream] = {}
        self._hand_offs: list[HandOff] = []
        self._lane: HostLane | None = None

    def runtime(self, device: str) -> DeviceRuntime:
        """The open runtime of "name:index"."""
        if device not in self._runtimes:
            self._runtimes[device] = self._open(device)
        return self._runtimes[device]

    def open_runtimes(self) -> tuple[DeviceRuntime, ...]:
        """The runtimes in use."""
        return tuple(self._runtimes.values())

    def stream(self, device: str) -> Stream:
        """The stream that this engine computes on."""
        if device not in self._streams:
            self._streams[device] = self.runtime(device).new_stream()
        return self._streams[device]

    def hand_off(self, experts: Experts, caller: str, hidden: int, top_k: int, max_tokens: int) -> HandOff:
        """Host experts as the modules of device `caller` see them."""
        if self._lane is None:
            self._lane = HostLane()
        made = HandOff(experts, self.runtime(caller), self.stream(caller), self._lane, hidden, top_k, max_tokens)
        self._hand_offs.append(made)
        return made

    @contextmanager
    def running(self) -> Iterator[None]:
        """Send torch work of every accelerator to this engine's stream."""
        with ExitStack() as stack:
            for device, runtime in self._runtimes.items():
                if runtime.device.type != "cpu":
                    stack.enter_context(runtime.use_stream(self.stream(device)))
            yield

    def synchronize(self) -> None:
        """Wait for all devices; raises errors that surface late."""
        for runtime in self._runtimes.values():
            runtime.synchronize()

    def check(self) -> None:
        """Raise what host experts raised; called when a step's result has reached the host."""
        for hand_off in self._hand_offs:
            hand_off.check()

    def close(self) -> None:
        """End the lane and close the runtimes."""
        if self._lane is not None:
            self._lane.close()
            self._lane = None
        while self._runtimes:
            self._runtimes.popitem()[1].close()
