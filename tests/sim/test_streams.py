"""Streams and events: order, true asynchrony under seeded delays, errors that surface late."""

from __future__ import annotations

import pytest
import torch
from ktcore_sim.options import SimOptions
from ktcore_sim.runtime import SimRuntime

from ktcore.errors import BackendError

from .conftest import Gate, Open

SEEDS = range(50)
DELAY_US = 300.0


def _relay(runtime: SimRuntime, wait: bool, steps: int = 4) -> list[float]:
    """Two streams hand a number to and fro, each adding one; without waits they overtake each other."""
    a, b = runtime.new_stream(), runtime.new_stream()
    with runtime.use_stream(a):
        x = torch.zeros(8, device=runtime.device)
        out = torch.zeros(steps, 8, device=runtime.device)
    runtime.synchronize()
    for step in range(steps):
        with runtime.use_stream(a):
            x.add_(1.0)
        if wait:
            runtime.wait_event(b, runtime.record_event(a))
        with runtime.use_stream(b):
            out[step].copy_(x)
            x.mul_(2.0)
        if wait:
            runtime.wait_event(a, runtime.record_event(b))
    runtime.synchronize()
    return [float(v) for v in out.cpu()[:, 0]]


def test_events_order_two_streams_under_any_delay(open_runtime: Open) -> None:
    for seed in SEEDS:
        assert _relay(open_runtime(seed=seed, delay_us=DELAY_US), wait=True) == [1.0, 3.0, 7.0, 15.0], f"seed {seed}"


def test_a_missing_wait_shows_as_a_wrong_result(open_runtime: Open) -> None:
    runs = [_relay(open_runtime(seed=seed, delay_us=DELAY_US), wait=False) for seed in SEEDS]
    wrong = sum(run != [1.0, 3.0, 7.0, 15.0] for run in runs)
    assert wrong > len(runs) // 2


def test_a_buffer_read_before_its_copy_arrives_shows_as_a_wrong_result(open_runtime: Open) -> None:
    stale = 0
    for seed in SEEDS:
        runtime = open_runtime(seed=seed, delay_us=DELAY_US)
        stream = runtime.new_stream()
        host = runtime.pinned_buffer((16,), torch.float32).fill_(-1.0)
        with runtime.use_stream(stream):
            x = torch.full((16,), 3.0, device=runtime.device)
        runtime.copy_async(host, x, stream)
        stale += bool((host != 3.0).any())
        runtime.synchronize(stream)
        assert (host == 3.0).all()
    assert stale > len(SEEDS) // 2


def test_work_of_one_stream_keeps_its_order(open_runtime: Open) -> None:
    for seed in SEEDS:
        runtime = open_runtime(seed=seed, delay_us=50)
        stream = runtime.new_stream()
        with runtime.use_stream(stream):
            x = torch.zeros(4, device=runtime.device)
            for n in range(10):
                x.mul_(2.0).add_(float(n % 2))
            assert x.cpu()[0] == 341.0


def test_delays_are_a_function_of_the_seed(open_runtime: Open) -> None:
    def drawn(seed: int) -> tuple[float, float]:
        runtime = open_runtime(seed=seed, delay_us=100)
        streams = runtime.new_stream(), runtime.new_stream()
        for stream in streams:
            with runtime.use_stream(stream):
                x = torch.zeros(1, device=runtime.device)
                for _ in range(10):
                    x.add_(1.0)
            runtime.synchronize(stream)
        return runtime.drawn_delay_us(streams[0]), runtime.drawn_delay_us(streams[1])

    draws = {seed: drawn(seed) for seed in range(8)}
    assert draws == {seed: drawn(seed) for seed in range(8)}
    every = [delay for pair in draws.values() for delay in pair]
    assert len(set(every)) == len(every)
    assert all(0 < delay < 11 * 100 for delay in every)


def test_latency_is_added_to_every_launch(open_runtime: Open) -> None:
    runtime = open_runtime(latency_us=2000)
    stream = runtime.new_stream()
    start, end = torch.Event("sim", enable_timing=True), torch.Event("sim", enable_timing=True)
    with runtime.use_stream(stream):
        x = torch.zeros(1, device=runtime.device)
        start.record()
        for _ in range(10):
            x.add_(1.0)
        end.record()
    runtime.synchronize()
    assert start.elapsed_time(end) >= 20.0


def test_the_host_does_not_wait_for_what_it_launches(runtime: SimRuntime) -> None:
    stream = runtime.new_stream()
    host = runtime.pinned_buffer((4,), torch.float32)
    with Gate(runtime, stream):
        blocked = runtime.counts().blocked
        with runtime.use_stream(stream):
            x = torch.ones(4, device=runtime.device)
            y = torch.softmax((x @ torch.ones(4, 4, device=runtime.device)).view(2, 2), -1)
            runtime.copy_async(host, y.view(4), stream)
        done = runtime.record_event(stream)
        assert not runtime.event_done(done)
        assert runtime.counts().blocked == blocked
    runtime.synchronize(done)
    assert (host == 0.5).all()


def test_streams_run_side_by_side(runtime: SimRuntime) -> None:
    a, b = runtime.new_stream(), runtime.new_stream()
    with Gate(runtime, a):
        with runtime.use_stream(b):
            x = torch.ones(3, device=runtime.device) * 2
        runtime.synchronize(b)
        assert not runtime.event_done(runtime.record_event(a))
    assert x.cpu().sum() == 6


def test_an_event_that_was_never_recorded_holds_nobody_up(runtime: SimRuntime) -> None:
    from ktcore_sim import _C

    stream, event = runtime.new_stream(), _C.Event()
    assert runtime.event_done(event)
    runtime.wait_event(stream, event)
    runtime.synchronize(stream)


def test_torch_streams_and_events_are_the_same_streams(runtime: SimRuntime) -> None:
    ours = runtime.new_stream()
    with Gate(runtime, ours), runtime.use_stream(ours):
        stream = torch.accelerator.current_stream(runtime.device)
        assert stream.stream_id == ours.id
        event = torch.Event(runtime.device.type)
        event.record(stream)
        assert not event.query()
    event.synchronize()
    assert stream.query()


def test_errors_surface_at_the_next_call_that_waits_and_are_raised_once(runtime: SimRuntime) -> None:
    stream = runtime.new_stream()
    runtime.fail(stream, "the card is on fire")
    with runtime.use_stream(stream):
        x = torch.ones(3, device=runtime.device)  # goes on: launches do not raise
    with pytest.raises(RuntimeError, match=rf"sim:0 stream {stream.id}, injected failure: the card is on fire"):
        runtime.synchronize(stream)
    runtime.synchronize()
    assert x.cpu().sum() == 3


@pytest.mark.parametrize("how", ["device", "stream", "event", "copy", "close"])
def test_every_call_that_waits_raises(open_runtime: Open, how: str) -> None:
    runtime = open_runtime()
    stream = runtime.new_stream()
    runtime.sleep(stream, 0.02)
    runtime.fail(stream, "no such address")
    with pytest.raises(RuntimeError, match="no such address"), runtime.use_stream(stream):
        if how == "device":
            runtime.synchronize()
        elif how == "stream":
            runtime.synchronize(stream)
        elif how == "event":
            runtime.synchronize(runtime.record_event(stream))
        elif how == "copy":
            torch.ones(1, device=runtime.device).cpu()
        else:
            runtime.close()


def test_a_bad_index_is_known_late(runtime: SimRuntime) -> None:
    table = torch.ones(4, 2, device=runtime.device)
    bad = table.index_select(0, torch.tensor([1, 9]).to(runtime.device))
    with pytest.raises(RuntimeError, match=r"aten::index_select: .*out of range"):
        runtime.synchronize()
    assert bad.cpu().isnan().all()


def test_a_bad_shape_is_known_at_once(runtime: SimRuntime) -> None:
    x = torch.ones(4, 2, device=runtime.device)
    with pytest.raises(RuntimeError, match="must match the size"):
        x + torch.ones(3, device=runtime.device)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        x @ x


def test_streams_of_a_closed_runtime_are_gone(open_runtime: Open) -> None:
    runtime = open_runtime()
    stream = runtime.new_stream()
    runtime.close()
    with pytest.raises(RuntimeError, match="was destroyed"):
        runtime.sleep(stream, 0)
    with pytest.raises(BackendError, match="is closed"):
        runtime.new_stream()


def test_a_device_that_does_not_exist() -> None:
    with pytest.raises(BackendError, match="there is no device sim:9"):
        SimRuntime(9, SimOptions())
