"""The devices of one engine: their runtimes, the stream that each computes on, and the hand-offs between them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

from ktcore.backend.host import HostRuntime
from ktcore.backend.lane import Lane
from ktcore.backend.runtime import DeviceRuntime, Stream
from ktcore.engine.experts.handoff import Experts, HandOff, HandOffTicket


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
        self._lanes: dict[str, Lane] = {}

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

    def hand_off(self, experts: Experts, home: str, caller: str, hidden: int, top_k: int, max_tokens: int) -> HandOff:
        """Experts of the host device `home` as the modules of device `caller` see them."""
        if home not in self._lanes:
            host = self.runtime(home)
            assert isinstance(host, HostRuntime), f"{home} is not a host device"
            self._lanes[home] = host.new_lane()
        runtime, stream = self.runtime(caller), self.stream(caller)
        made = HandOff(experts, runtime, stream, self._lanes[home], hidden, top_k, max_tokens)
        self._hand_offs.append(made)
        return made

    @contextmanager
    def running(self) -> Iterator[None]:
        """Send torch work of every accelerator to this engine's stream.

        What fails inside leaves no submission to host experts behind.
        """
        with ExitStack() as stack:
            for device, runtime in self._runtimes.items():
                if runtime.device.type != "cpu":
                    stack.enter_context(runtime.use_stream(self.stream(device)))
            try:
                yield
            except BaseException:
                for hand_off in self._hand_offs:
                    hand_off.abandon()
                raise

    def synchronize(self) -> None:
        """Wait for all devices; raises errors that surface late."""
        for runtime in self._runtimes.values():
            runtime.synchronize()

    def take_over(self) -> list[HandOffTicket]:
        """The outstanding tickets of all hand-offs, for the owner of a graph that was captured with them."""
        return [ticket for hand_off in self._hand_offs for ticket in hand_off.take_over()]

    @property
    def hands_off(self) -> bool:
        """Whether experts of this engine run on a host device."""
        return bool(self._hand_offs)

    def check(self) -> None:
        """Raise what host experts raised; called when a step's result has reached the host."""
        for hand_off in self._hand_offs:
            hand_off.check()

    def close(self) -> None:
        """End the lanes and close the runtimes."""
        self._hand_offs.clear()
        while self._lanes:
            self._lanes.popitem()[1].close()
        while self._runtimes:
            self._runtimes.popitem()[1].close()
