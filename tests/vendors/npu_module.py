"""The surface of torch_npu.npu over the simulated device: what `torch_module` has, and Ascend's own.

Sources as in `ktcore_npu.runtime`: reports must be subscribed to before a host function is launched through torch_npu;
a task group is recorded in a capture, and between `graph_task_update_begin` and `_end` the operator is issued again on
another stream, with the same tensors and other lists; an external event is waited for before it is recorded.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch
from ktcore_sim.runtime import SimRuntime

from tests.vendors.torch_module import Module

PATIENCE = 60.0


class Task:
    """One operator of a task group: what runs at a replay."""

    def __init__(self, name: str, kernel: Callable[..., None], tensors: Sequence[torch.Tensor]) -> None:
        self.name = name
        self.kernel = kernel
        self.addresses = [t.data_ptr() for t in tensors]

    def __call__(self, *tensors: torch.Tensor) -> None:
        self.kernel(*tensors)


class NpuModule(Module):
    """torch_npu.npu with one device."""

    def __init__(self, runtime: SimRuntime, properties: SimpleNamespace) -> None:
        super().__init__(runtime, properties, "npu_stream", "NPUGraph")
        self.reports: list[Any] = []
        self.host_calls = 0
        self.updates = 0
        self.capturing = False
        self._group: list[Task] | None = None
        self._update: tuple[Any, list[Task]] | None = None
        module = self

        class ExternalEvent:
            def __init__(self) -> None:
                self._recorded = threading.Event()

            def wait(self, stream: Any) -> None:
                def until() -> None:
                    if not self._recorded.wait(PATIENCE):
                        raise RuntimeError("an external event was waited for and never recorded")

                module.launch(stream, "external_event_wait", until, [])

            def reset(self, stream: Any) -> None:
                module.launch(stream, "external_event_reset", self._recorded.clear, [])

            def record(self, stream: Any) -> None:
                module.launch(stream, "external_event_record", self._recorded.set, [])

        self.ExternalEvent = ExternalEvent

    def launch(self, stream: Any, name: str, kernel: Callable[..., Any], tensors: Sequence[torch.Tensor]) -> None:
        """Run `kernel` on CPU tensors over the same memory when `stream` gets there."""
        self.runtime.launch_python(stream.sim, kernel, tensors, name)

    def issue(self, name: str, kernel: Callable[..., None], tensors: Sequence[torch.Tensor]) -> None:
        """An operator on the current stream: part of a group, an update of one, or plain."""
        stream = self.current_stream()
        if self._update is not None:
            updated, left = self._update
            assert updated.sim.id == stream.sim.id, "an update is issued on another stream than it was begun on"
            assert left, "more operators are updated than the group has"
            task = left.pop(0)
            assert task.name == name, f"{name} updates {task.name}"
            assert task.addresses == [t.data_ptr() for t in tensors], "an update with other tensors"
            self.updates += 1
            self.launch(stream, "task_update", lambda: setattr(task, "kernel", kernel), [])
            return
        task = Task(name, kernel, tensors)
        if self._group is not None:
            self._group.append(task)
        self.launch(stream, name, task, tensors)

    def graph_task_group_begin(self, stream: Any) -> None:
        """Operators from now on can be updated."""
        assert self.capturing, "a task group outside of a capture"
        assert self._group is None, "task groups do not nest"
        self._group = []

    def graph_task_group_end(self, stream: Any) -> list[Task]:
        """The group's handle."""
        assert self._group, "an empty task group"
        made, self._group = self._group, None
        return made

    def graph_task_update_begin(self, stream: Any, handle: list[Task]) -> None:
        """Operators from now on replace those of the group."""
        assert not self.capturing, "an update within a capture"
        assert self._update is None, "updates do not nest"
        self._update = (stream, list(handle))

    def graph_task_update_end(self, stream: Any) -> None:
        """All of the group were replaced."""
        assert self._update is not None
        assert not self._update[1], "a group was updated in part"
        self._update = None

    @contextmanager
    def graph(self, graph: Any, pool: Any = None, stream: Any = None) -> Iterator[None]:
        """Capture what is launched within; one capture a graph."""
        assert graph.made is None, "an NPUGraph is captured once"
        with super().graph(graph, pool, stream):
            self.capturing = True
            try:
                yield
            finally:
                self.capturing, self._group = False, None

    def _subscribe_report(self, stream: Any) -> None:
        assert stream.sim not in self.reports, "subscribed twice"
        self.reports.append(stream.sim)

    def _unsubscribe_report(self, stream: Any) -> None:
        self.reports.remove(stream.sim)

    def _launch_host_func(self, stream: Any, function: Callable[[Any], None], data: Any) -> None:
        assert stream.sim in self.reports, "aclrtLaunchCallback: nobody polls the reports of this stream"
        self.host_calls += 1
        self.launch(stream, "host_func", lambda: function(data), [])
