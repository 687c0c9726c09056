"""Kernels written in Python, and operators that run as launches though the device does not list them."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest
import torch
from ktcore_sim.runtime import SimRuntime

from .conftest import Gate, Open


@pytest.fixture
def all_on_device(runtime: SimRuntime) -> Iterator[SimRuntime]:
    runtime.run_all_on_device()
    yield runtime
    runtime.run_all_on_device(False)


def double_into(source: torch.Tensor, target: torch.Tensor) -> None:
    assert source.device.type == target.device.type == "cpu"
    target.copy_(source * 2)


def test_it_runs_in_stream_order_and_the_host_does_not_wait(open_runtime: Open) -> None:
    for seed in range(10):
        runtime = open_runtime(seed=seed, delay_us=200)
        stream = runtime.new_stream()
        with runtime.use_stream(stream):
            x = torch.full((5,), 1.0, device=runtime.device)
            y = torch.empty(5, device=runtime.device)
            with Gate(runtime, stream):
                x.add_(2)
                runtime.launch_python(stream, double_into, [x, y], "double")
                x.zero_()
                assert not runtime._native.idle(stream.device, stream.id)
            assert y.cpu().tolist() == [6.0] * 5
        assert runtime.fallback_count() == 0


def test_views_keep_their_place_and_strides(runtime: SimRuntime) -> None:
    stream = runtime.new_stream()
    with runtime.use_stream(stream):
        x = torch.arange(12, device=runtime.device).view(3, 4)
        y = torch.zeros_like(x)
        runtime.launch_python(stream, double_into, [x.t()[1:3], y.t()[1:3]], "double")
        assert torch.equal(y.cpu()[:, 1:3], 2 * torch.arange(12).view(3, 4)[:, 1:3])
        assert y.cpu()[:, 0].tolist() == [0, 0, 0]


def test_what_it_raises_surfaces_late_with_its_name(runtime: SimRuntime) -> None:
    def broken(x: torch.Tensor) -> None:
        raise ValueError(f"{x.numel()} is no good number")

    stream = runtime.new_stream()
    with runtime.use_stream(stream):
        x = torch.zeros(3, device=runtime.device)
    runtime.launch_python(stream, broken, [x], "my kernel")
    with pytest.raises(RuntimeError, match="my kernel: ValueError: 3 is no good number"):
        runtime.synchronize(stream)


def test_memory_that_was_given_back_and_host_memory_are_refused(runtime: SimRuntime) -> None:
    stream, other = runtime.new_stream(), runtime.new_stream()
    with runtime.use_stream(other):
        x = torch.zeros(3, device=runtime.device)
    with Gate(runtime, stream):
        runtime.launch_python(stream, lambda x: x.add_(1), [x], "late")
        del x
        runtime.synchronize(other)
    with pytest.raises(RuntimeError, match=r"late: .*given back"):
        runtime.synchronize(stream)
    with pytest.raises(RuntimeError, match="cannot be accessed from the device"):
        runtime.launch_python(stream, lambda x: None, [torch.zeros(3)], "host")


def test_a_graph_runs_it_at_every_replay_and_lets_go_of_it(runtime: SimRuntime) -> None:
    class Kernel:
        calls = 0

        def __call__(self, x: torch.Tensor) -> None:
            Kernel.calls += 1
            x.add_(1)

        def __del__(self) -> None:
            Kernel.calls = -1

    stream, side = runtime.new_stream(), runtime.new_stream()
    with runtime.use_stream(stream):
        x = torch.zeros(3, device=runtime.device)

    def work() -> None:
        kernel = Kernel()
        runtime.launch_python(stream, kernel, [x], "add one")
        runtime.wait_event(side, runtime.record_event(stream))
        runtime.launch_python(side, kernel, [x], "add one")
        runtime.wait_event(stream, runtime.record_event(side))

    graph = runtime.capture(stream, work)
    assert Kernel.calls == 0
    for _ in range(3):
        graph.replay(stream)
    with runtime.use_stream(stream):
        assert x.cpu().tolist() == [6.0] * 3
    del graph
    gc.collect()
    assert Kernel.calls == -1


def test_operators_outside_of_the_list_can_run_as_launches(all_on_device: SimRuntime) -> None:
    runtime, stream = all_on_device, all_on_device.new_stream()
    with runtime.use_stream(stream):
        edges, x = torch.tensor([1.0, 3.0, 5.0]).to(runtime.device), torch.tensor([0.5, 3.0, 9.0]).to(runtime.device)
        runtime.synchronize()
        blocked = runtime.counts().blocked
        with Gate(runtime, stream):
            found = torch.searchsorted(edges, x, right=True)
            total = torch.cumprod(x, 0)
            assert runtime.counts().blocked == blocked
        assert found.cpu().tolist() == [0, 2, 3]
        assert total.cpu().tolist() == [0.5, 1.5, 13.5]
    assert runtime.fallback_count() == 0


def test_operators_whose_sizes_depend_on_data_are_still_counted(all_on_device: SimRuntime) -> None:
    x = torch.tensor([3, 1, 3]).to(all_on_device.device)
    assert torch.unique(x).cpu().tolist() == [1, 3]
    assert all_on_device.fallback_count() >= 1
