"""Runtimes of the simulated accelerator that are closed, checked for late errors and for leaks after each test."""

from __future__ import annotations

import ctypes
import gc
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from ktcore_sim.options import SimOptions
from ktcore_sim.runtime import SimRuntime

Open = Callable[..., SimRuntime]


class Gate:
    """Holds a stream up until it is opened, so that tests of order need no clock."""

    def __init__(self, runtime: SimRuntime, stream: Any) -> None:
        self._opened = threading.Event()
        self._wait = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(lambda data: (self._opened.wait(60), None)[1])
        runtime.launch_host(stream, ctypes.cast(self._wait, ctypes.c_void_p).value or 0, 0)
        self._runtime, self._stream = runtime, stream

    def open(self) -> None:
        """Let the stream go on."""
        self._opened.set()

    def __enter__(self) -> Gate:
        return self

    def __exit__(self, *error: object) -> None:
        self.open()
        # the C function must outlive its call
        while not self._runtime._native.idle(self._stream.device, self._stream.id):
            pass


@pytest.fixture(scope="module", autouse=True)
def _frozen(frozen_garbage: None) -> None:
    """Tests here search for garbage many times."""


@pytest.fixture
def open_runtime() -> Iterator[Open]:
    """Opens `SimRuntime(index, SimOptions(**options))`; what it held must be given back when the test ends."""
    opened: list[SimRuntime] = []
    before: dict[int, Any] = {}

    def opener(index: int = 0, **options: Any) -> SimRuntime:
        runtime = SimRuntime(index, SimOptions(**options))
        if index not in before:
            gc.collect()  # what another file's tests left to be collected is none of this one's
        before.setdefault(index, runtime.held())
        opened.append(runtime)
        return runtime

    yield opener
    for runtime in opened:
        runtime.close()
    gc.collect()
    for runtime in opened:
        index = runtime.device.index
        left = runtime.held()
        assert left == before[index], f"sim:{index} leaks"


@pytest.fixture
def runtime(open_runtime: Open) -> SimRuntime:
    """sim:0 without delays."""
    return open_runtime()


@pytest.fixture(autouse=True)
def _inference() -> Iterator[None]:
    with torch.inference_mode():
        yield


@pytest.fixture
def run_python() -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs code in a process of its own, with `environment` added."""

    def run(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
        import os

        return subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, **environment},
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )

    return run
