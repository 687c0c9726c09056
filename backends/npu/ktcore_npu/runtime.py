"""The device runtime: torch_npu's device module, host functions by either of two ways, graphs whose arguments change.

Sources: Ascend/pytorch `torch_npu/npu/streams.py`, `graphs.py`, `csrc/core/npu/NPUGraph.cpp`, and its test of
`graph_task_update_begin`; vllm-ascend `attention/attention_v1.py` for how argument lists of a graph are exchanged.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary

import torch

from ktcore.backend import DeviceGraph, GraphMode, HostCallbackMode
from ktcore.backend.runtime import Stream
from ktcore.backend.torch_runtime import TorchDeviceRuntime
from ktcore.errors import BackendError
from ktcore_npu.devices import live
from ktcore_npu.vendor import NpuVendor, torch_vendor

MASK = 2048
HOST_FUNCTION = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


class NpuRuntime(TorchDeviceRuntime):
    """One Ascend device.

    torch_npu puts a task queue between Python and the stream, which raw calls on the stream's handle would overtake.
    With TASK_QUEUE_ENABLE=0 there is no queue, and host functions go to `aclrtLaunchHostFunc`; else, or where the ACL
    runtime lacks it, they go through torch_npu's own `_launch_host_func`, which needs a thread that polls the stream's
    reports. Graphs are offered unless TASK_QUEUE_ENABLE is 2 or pinned memory lies in expandable segments.

    Attributes:
        ops: torch_npu.
        capturing: whether what is launched now is recorded: operators with lists as arguments then make them
            exchangeable.
        workspaces: of the fused attention in graphs, by what is captured and shape.
    """

    def __init__(self, index: int, vendor: NpuVendor | None = None) -> None:
        vendor = vendor or torch_vendor()
        properties = vendor.module.get_device_properties(index)
        found = live(properties.name, properties.total_memory)
        queue = vendor.environment.get("TASK_QUEUE_ENABLE", "1")
        expandable = "pin_memory_expandable_segments:true" in vendor.environment.get(
            "PYTORCH_NPU_ALLOC_CONF", ""
        ).lower().replace(" ", "")
        self.no_graphs = _no_graphs(queue, expandable)
        super().__init__(vendor.module, vendor.device_type, index, found, None if self.no_graphs else "NPUGraph")
        if self.graph is not GraphMode.NONE:
            self.graph = GraphMode.CAPTURE_UPDATE
        self.ops = vendor.ops
        self.capturing = False
        self.workspaces: WeakKeyDictionary[Any, dict[tuple[int, ...], Any]] = WeakKeyDictionary()
        self._acl = getattr(vendor.acl(), "aclrtLaunchHostFunc", None) if queue == "0" else None
        if self._acl is not None:
            self._acl.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p]
        self._subscribed: list[Stream] = []
        self._calls: dict[tuple[int, int], Callable[[], None]] = {}
        if self._acl is not None or hasattr(vendor.module, "_launch_host_func"):
            self.host_callback = HostCallbackMode.CAPTURABLE
        self._update_stream: Stream | None = None
        self._mask: torch.Tensor | None = None

    @property
    def module(self) -> Any:
        """torch_npu.npu."""
        return self._module

    @property
    def update_stream(self) -> Stream:
        """Where arguments of captured operators are exchanged."""
        if self._update_stream is None:
            self._update_stream = self.new_stream()
        return self._update_stream

    def causal_mask(self) -> torch.Tensor:
        """bool [2048, 2048], True above the diagonal: what sparse modes 2 to 4 of the fused attention want.

        Made once, on the host, and there before anybody asks on another stream.
        """
        if self._mask is None:
            with torch.inference_mode(False):
                self._mask = torch.ones(MASK, MASK, dtype=torch.bool).triu_(1).to(self.device)
            self.synchronize()
        return self._mask

    def launch_host(self, stream: Stream, function: int, data: int) -> None:
        if self._acl is not None:
            error = self._acl(stream.npu_stream, function, data)
            if error:
                raise BackendError(f"aclrtLaunchHostFunc returned {error} on {self.device}")
            return
        if self.host_callback is HostCallbackMode.NONE:
            super().launch_host(stream, function, data)
        self._subscribe(stream)
        # a graph calls it at every replay: kept as long as the device is open
        call = self._calls.setdefault((function, data), _bound(function, data))
        self._module._launch_host_func(stream, _run, call)

    def capture(self, stream: Stream, work: Callable[[], None]) -> DeviceGraph:
        if self.no_graphs:
            raise NotImplementedError(f"{self.device} has no graphs: {self.no_graphs}")
        if self.host_callback is not HostCallbackMode.NONE and self._acl is None:
            self._subscribe(stream)
        self.capturing = True
        try:
            return super().capture(stream, work)
        finally:
            self.capturing = False

    def close(self) -> None:
        while self._subscribed:
            stream = self._subscribed.pop()
            stream.synchronize()
            self._module._unsubscribe_report(stream)
        self._calls.clear()
        self._mask = self._update_stream = None

    def _subscribe(self, stream: Stream) -> None:
        if not any(known is stream for known in self._subscribed):
            self._module._subscribe_report(stream)
            self._subscribed.append(stream)


def _no_graphs(queue: str, expandable: bool) -> str:
    """Why there are none; empty where there are."""
    if queue == "2":
        return "TASK_QUEUE_ENABLE is 2, set it to 1 or 0"
    return "pin_memory_expandable_segments is on in PYTORCH_NPU_ALLOC_CONF" if expandable else ""


def _bound(function: int, data: int) -> Callable[[], None]:
    called = HOST_FUNCTION(function)
    return lambda: called(data)


def _run(call: Callable[[], None]) -> None:
    call()
