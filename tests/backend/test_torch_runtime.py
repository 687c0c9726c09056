"""The runtime over a torch device module, against a module that only notes what it is asked."""

from __future__ import annotations

from contextlib import contextmanager
from typing import Any

import pytest
import torch

from ktcore.backend import Capabilities, GraphMode
from ktcore.backend.torch_runtime import TorchDeviceRuntime


class Stream:
    def __init__(self, log: list[str], device: torch.device) -> None:
        self.log, self.device = log, device

    def wait_event(self, event: Any) -> None:
        self.log.append("wait")

    def synchronize(self) -> None:
        self.log.append("sync stream")


class Module:
    """The surface of a torch device module."""

    def __init__(self) -> None:
        self.log: list[str] = []
        log = self.log

        class Event:
            def record(self, stream: Stream) -> None:
                log.append("record")

            def query(self) -> bool:
                return True

        class MadeGraph:
            def replay(self) -> None:
                log.append("replay")

        self.Event = Event
        self.MadeGraph = MadeGraph

    def Stream(self, device: torch.device) -> Stream:
        return Stream(self.log, device)

    @contextmanager
    def stream(self, stream: Stream) -> Any:
        self.log.append("enter")
        yield
        self.log.append("leave")

    @contextmanager
    def graph(self, graph: Any, stream: Stream) -> Any:
        self.log.append("capture")
        yield
        self.log.append("captured")

    def synchronize(self, device: torch.device) -> None:
        self.log.append(f"sync {device}")

    def mem_get_info(self, index: int) -> tuple[int, int]:
        return 10 + index, 100


@pytest.fixture
def module() -> Module:
    return Module()


def runtime(module: Module, graph: str | None = None) -> TorchDeviceRuntime:
    return TorchDeviceRuntime(module, "meta", 1, Capabilities("made", "made"), graph)


def test_streams_and_events_go_to_the_module_in_order(module: Module) -> None:
    run = runtime(module)
    stream = run.new_stream()
    assert stream.device == run.device == torch.device("meta", 1)
    event = run.record_event(stream)
    run.wait_event(stream, event)
    assert run.event_done(event)
    run.synchronize(stream)
    run.synchronize()
    assert module.log == ["record", "wait", "sync stream", "sync meta:1"]
    assert (run.memory().free, run.memory().total) == (11, 100)


def test_copies_run_on_the_given_stream(module: Module) -> None:
    source, target = torch.arange(4), torch.zeros(4, dtype=torch.int64)
    runtime(module).copy_async(target, source, Stream(module.log, torch.device("cpu")))
    assert module.log == ["enter", "leave"]
    assert target.tolist() == [0, 1, 2, 3]


def test_graphs_are_captured_and_replayed_on_a_stream(module: Module) -> None:
    run = runtime(module, "MadeGraph")
    assert run.graph is GraphMode.CAPTURE
    graph = run.capture(run.new_stream(), lambda: module.log.append("work"))
    graph.replay(run.new_stream())
    assert module.log == ["capture", "work", "captured", "enter", "replay", "leave"]


def test_without_a_graph_class_there_is_no_capture(module: Module) -> None:
    run = runtime(module)
    assert run.graph is GraphMode.NONE
    with pytest.raises(NotImplementedError, match="has no graphs"):
        run.capture(run.new_stream(), lambda: None)
    with pytest.raises(NotImplementedError, match="no host callbacks"):
        run.launch_host(run.new_stream(), 0, 0)


def test_copies_do_not_hold_up_the_host(module: Module) -> None:
    asked: list[Any] = []

    class Target:
        def copy_(self, source: str, non_blocking: bool = False) -> None:
            asked.append((source, non_blocking, list(module.log)))

    target: Any = Target()
    runtime(module).copy_async(target, "source", Stream(module.log, torch.device("cpu")))  # type: ignore[arg-type]
    assert asked == [("source", True, ["enter"])]
