"""The host as a device."""

from __future__ import annotations

import ctypes

import torch

from ktcore.backend.capabilities import Capabilities
from ktcore.backend.host import HostRuntime


def test_copies_events_and_callbacks_are_done_when_they_return() -> None:
    runtime = HostRuntime()
    stream = runtime.new_stream()
    buffer = runtime.pinned_buffer((3, 2), torch.float32)
    with runtime.use_stream(stream):
        runtime.copy_async(buffer, torch.ones(3, 2), stream)
    event = runtime.record_event(stream)
    runtime.wait_event(runtime.new_stream(), event)
    assert runtime.event_done(event)
    runtime.synchronize(event)
    assert buffer.sum() == 6

    seen = ctypes.c_int(0)
    increment = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(
        lambda p: setattr(ctypes.cast(p, ctypes.POINTER(ctypes.c_int)).contents, "value", 7)
    )
    runtime.launch_host(stream, ctypes.cast(increment, ctypes.c_void_p).value or 0, ctypes.addressof(seen))
    assert seen.value == 7


def test_memory_is_that_of_the_machine() -> None:
    memory = HostRuntime().memory()
    assert 0 < memory.free <= memory.total


def test_capabilities_are_those_given_or_the_hosts_memory() -> None:
    given = Capabilities("made", "card")
    assert HostRuntime(given).capabilities() is given
    plain = HostRuntime().capabilities()
    assert (plain.backend, plain.live, plain.memory_bytes) == ("host", True, HostRuntime().memory().total)
