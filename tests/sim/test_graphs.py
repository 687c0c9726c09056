"""Host functions in each of the three modes, and graphs: captured, replayed, refused."""

from __future__ import annotations

import ctypes
from collections.abc import Callable

import pytest
import torch
from ktcore_sim.runtime import SimRuntime

from ktcore.backend import GraphMode, HostCallbackMode
from ktcore.backend.lane import ThreadLane
from ktcore.engine.experts.handoff import HandOff

from .conftest import Open

C_FUNCTION = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


class Recorder:
    """A C function that notes its argument, and what a pinned buffer held at that moment."""

    def __init__(self, buffer: torch.Tensor | None = None) -> None:
        self.calls: list[int] = []
        self.seen: list[float] = []
        self._buffer = buffer
        self._function = C_FUNCTION(self._call)
        self.address = ctypes.cast(self._function, ctypes.c_void_p).value or 0

    def _call(self, data: int) -> None:
        self.calls.append(data)
        if self._buffer is not None:
            self.seen.append(float(self._buffer[0]))
            self._buffer[0] += 100.0


def test_without_callbacks_launch_host_says_so(open_runtime: Open) -> None:
    runtime = open_runtime(host_callback=HostCallbackMode.NONE)
    with pytest.raises(NotImplementedError, match="no host callbacks"):
        runtime.launch_host(runtime.new_stream(), Recorder().address, 1)


@pytest.mark.parametrize("mode", [HostCallbackMode.EAGER, HostCallbackMode.CAPTURABLE])
def test_a_host_function_runs_in_stream_order(open_runtime: Open, mode: HostCallbackMode) -> None:
    for seed in range(20):
        runtime = open_runtime(host_callback=mode, seed=seed, delay_us=200)
        assert runtime.host_callback is mode
        stream = runtime.new_stream()
        pinned = runtime.pinned_buffer((4,), torch.float32)
        recorder = Recorder(pinned)
        with runtime.use_stream(stream):
            x = torch.full((4,), 5.0, device=runtime.device)
            back = torch.empty(4, device=runtime.device)
        runtime.copy_async(pinned, x, stream)
        runtime.launch_host(stream, recorder.address, 7)
        runtime.copy_async(back, pinned, stream)
        with runtime.use_stream(stream):
            assert back.cpu()[0] == 105.0
        assert (recorder.calls, recorder.seen) == ([7], [5.0])
        assert runtime.counts().host_calls == 1


def test_an_eager_host_function_cannot_be_captured(open_runtime: Open) -> None:
    runtime = open_runtime(host_callback=HostCallbackMode.EAGER)
    stream = runtime.new_stream()
    with pytest.raises(RuntimeError, match="does not allow an eager host function"):
        runtime.capture(stream, lambda: runtime.launch_host(stream, Recorder().address, 1))


def test_a_runtime_without_graphs_says_so(open_runtime: Open) -> None:
    runtime = open_runtime(graph=GraphMode.NONE)
    with pytest.raises(NotImplementedError, match="no graphs"):
        runtime.capture(runtime.new_stream(), lambda: None)


def test_capture_runs_nothing_and_every_replay_runs_all(open_runtime: Open) -> None:
    for seed in range(10):
        runtime = open_runtime(seed=seed, delay_us=200)
        stream = runtime.new_stream()
        down, up = runtime.pinned_buffer((4,), torch.float32), runtime.pinned_buffer((4,), torch.float32)
        recorder = Recorder(down)
        result: list[torch.Tensor] = []
        with runtime.use_stream(stream):
            x = torch.zeros(4, device=runtime.device)
        down.fill_(-1.0)

        def work(
            runtime: SimRuntime = runtime,
            stream: object = stream,
            x: torch.Tensor = x,
            down: torch.Tensor = down,
            recorder: Recorder = recorder,
            result: list[torch.Tensor] = result,
        ) -> None:
            y = x * 2
            runtime.copy_async(down, y, stream)
            runtime.launch_host(stream, recorder.address, 3)
            back = torch.empty(4, device=runtime.device)
            runtime.copy_async(back, down, stream)
            result.append(back + y)

        graph = runtime.capture(stream, work)
        runtime.synchronize()
        assert recorder.calls == []
        assert (down == -1.0).all()
        for n in range(1, 6):
            with runtime.use_stream(stream):
                x.fill_(float(n))
            graph.replay(stream)
            runtime.copy_async(up, result[0], stream)
            runtime.synchronize(stream)
            assert up.tolist() == [100.0 + 4 * n, *[4.0 * n] * 3]
            assert recorder.calls == [3] * n


def test_a_graph_spans_the_streams_that_follow_by_events(open_runtime: Open) -> None:
    for seed in range(20):
        runtime = open_runtime(seed=seed, delay_us=200)
        main, side = runtime.new_stream(), runtime.new_stream()
        with runtime.use_stream(main):
            x, out = torch.zeros(4, device=runtime.device), torch.zeros(4, device=runtime.device)
        runtime.synchronize()

        def work(
            runtime: SimRuntime = runtime,
            main: object = main,
            side: object = side,
            x: torch.Tensor = x,
            out: torch.Tensor = out,
        ) -> None:
            y = x + 1
            runtime.wait_event(side, runtime.record_event(main))
            with runtime.use_stream(side):
                z = y * 10
            runtime.wait_event(main, runtime.record_event(side))
            out.copy_(z + y)

        graph = runtime.capture(main, work)
        other = runtime.new_stream()
        for n in range(5):
            with runtime.use_stream(other):
                x.fill_(float(n))
            graph.replay(other)
            with runtime.use_stream(other):
                assert out.cpu()[0] == 11.0 * (n + 1)


def test_a_graph_keeps_its_memory_and_gives_it_back(runtime: SimRuntime) -> None:
    stream = runtime.new_stream()
    x = torch.ones(256, device=runtime.device)
    out = torch.zeros(256, device=runtime.device)
    before = runtime.held()
    graph = runtime.capture(stream, lambda: out.copy_((x + 1) * 2))
    assert runtime.held().bytes == before.bytes + 2 * 1024
    for _ in range(50):  # would take the temporaries' room if it were free
        torch.zeros(256, device=runtime.device)
    graph.replay(stream)
    runtime.synchronize()
    assert (out.cpu() == 4).all()
    graph.replay(stream)
    del graph  # while it runs
    runtime.synchronize()
    assert runtime.held() == before


def test_a_replay_after_its_input_was_freed_is_an_error(runtime: SimRuntime) -> None:
    stream = runtime.new_stream()
    inputs, out = [torch.ones(8, device=runtime.device)], torch.zeros(8, device=runtime.device)
    graph = runtime.capture(stream, lambda: out.copy_(inputs[0]))
    inputs.clear()
    runtime.synchronize()
    graph.replay(stream)
    with pytest.raises(RuntimeError, match="use after free"):
        runtime.synchronize()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("synchronize", "does not allow synchronize"),
        ("item", "does not allow a"),
        ("pageable", "does not allow a copy of pageable memory"),
        ("fallback", "does not allow a"),
        ("outside event", "event from outside of the capture"),
        ("unjoined", "work nobody waits for"),
        ("own error", "mine"),
    ],
)
def test_what_a_capture_refuses_leaves_the_stream_usable(runtime: SimRuntime, name: str, message: str) -> None:
    stream, side = runtime.new_stream(), runtime.new_stream()
    x = torch.ones(4, device=runtime.device)
    runtime.synchronize()
    outside = runtime.record_event(side)

    def unjoined() -> None:
        runtime.wait_event(side, runtime.record_event(stream))
        with runtime.use_stream(side):
            x + 1

    def own_error() -> None:
        raise ValueError("mine")

    works: dict[str, Callable[[], object]] = {
        "synchronize": lambda: runtime.synchronize(stream),
        "item": lambda: x.sum().item(),
        "pageable": lambda: x.copy_(torch.ones(4), non_blocking=True),
        "fallback": lambda: torch.multinomial(x, 1),
        "outside event": lambda: runtime.wait_event(stream, outside),
        "unjoined": unjoined,
        "own error": own_error,
    }
    with pytest.raises((RuntimeError, ValueError), match=message):
        runtime.capture(stream, lambda: (works[name](), None)[1])
    with runtime.use_stream(stream):
        assert (x + 1).sum().item() == 8
    with runtime.use_stream(side):
        assert (x + 1).sum().item() == 8


def test_replays_of_two_graphs_queue_up(runtime: SimRuntime) -> None:
    stream = runtime.new_stream()
    x = torch.zeros(4, device=runtime.device)
    add, double = runtime.capture(stream, lambda: x.add_(1.0)), runtime.capture(stream, lambda: x.mul_(2.0))
    runtime.synchronize()
    for _ in range(4):
        add.replay(stream)
        double.replay(stream)
    with runtime.use_stream(stream):
        assert x.cpu()[0] == 30.0


def test_a_captured_hand_off_calls_the_host_experts_at_every_replay(open_runtime: Open) -> None:
    lane, runs = ThreadLane(), []

    def experts(x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        runs.append(len(x))
        return x * (ids * weights).sum(-1, keepdim=True)

    for seed in range(10):
        runtime = open_runtime(seed=seed, delay_us=200)
        stream = runtime.new_stream()
        hand_off = HandOff(experts, runtime, stream, lane, 32, 4, 8)
        with runtime.use_stream(stream):
            x, weights = (torch.ones(3, n, device=runtime.device) for n in (32, 4))
            ids, out = weights.long(), torch.zeros_like(x)
        runtime.synchronize()
        inputs = (x, ids, weights, out)
        graph = runtime.capture(stream, lambda h=hand_off, i=inputs: i[3].copy_(h(i[0] * 1.0, i[1], i[2]) + 1))  # type: ignore[misc]
        runs.clear()
        for n in range(4):
            with runtime.use_stream(stream):
                x.fill_(float(n))
                graph.replay(stream)
                assert (out.cpu() == 4 * n + 1).all()
        hand_off.check()
        assert runs == [3] * 4
    lane.close()
