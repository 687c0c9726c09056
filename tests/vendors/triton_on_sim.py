"""Triton kernels on the simulated device: a launch becomes a task of the current stream, which the interpreter runs.

So kernels are ordered by streams, late, captured and replayed like those of a real device, and only they touch its
memory. The interpreter keeps its state in globals: one kernel runs at a time.
"""

from __future__ import annotations

import threading
from typing import Any

import torch
from triton.runtime.interpreter import GridExecutor

_ONE_AT_A_TIME = threading.Lock()


def install(runtime: Any) -> None:
    """From now on, launches with tensors of this runtime's device go to its current stream."""
    interpret = GridExecutor.__call__

    def launch(executor: Any, *args: Any, **kwargs: Any) -> None:
        names = list(kwargs)
        values = [*args, *kwargs.values()]
        places = [i for i, v in enumerate(values) if isinstance(v, torch.Tensor)]
        if not any(values[i].device.type == runtime.device.type for i in places):
            interpret(executor, *args, **kwargs)
            return
        host = [i for i in places if values[i].device.type != runtime.device.type]
        if host:
            # what Triton says of a host tensor on a real device
            raise ValueError(f"Pointer argument (at {host[0]}) cannot be accessed from Triton (cpu tensor?)")
        plain = [None if i in places else v for i, v in enumerate(values)]

        def kernel(*tensors: torch.Tensor) -> None:
            given = list(plain)
            for i, tensor in zip(places, tensors, strict=True):
                given[i] = tensor
            with _ONE_AT_A_TIME, torch.inference_mode():
                interpret(executor, *given[: len(args)], **dict(zip(names, given[len(args) :], strict=True)))

        index = runtime.device.index
        name = getattr(executor.fn, "__name__", "kernel")
        stream = runtime._native.current_stream(index)
        runtime._native.launch_python(index, stream, kernel, [values[i] for i in places], name)

    GridExecutor.__call__ = launch
