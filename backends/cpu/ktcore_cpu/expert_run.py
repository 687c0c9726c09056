"""The threads that expert layers share, and calls that run beside the caller."""

from __future__ import annotations

from collections.abc import Sequence
from threading import Lock
from typing import Any

import numpy as np

from ktcore_cpu import _native, expert_arrays
from ktcore_cpu.expert_arrays import Floats
from ktcore_cpu.switch import Switch


class ExpertPool:
    """Threads that any number of layers share; one call runs at a time, others wait.

    Args:
        threads: 0 takes one for each physical core that the process may use.
        cpus: CPU of each thread. Workers 1.. are pinned to theirs; number 0 is whichever thread calls.

    Raises:
        ValueError: impossible numbers, or KTCORE_ISA asks for what this CPU lacks.
    """

    def __init__(self, threads: int = 0, cpus: Sequence[int] | None = None) -> None:
        self.native = _native.Pool(threads, None if cpus is None else list(cpus))
        self.switch = Switch(self.native)
        self._lane: _native.Lane | None = None
        self._starting = Lock()

    @property
    def threads(self) -> int:
        """How many there are, the caller's included."""
        return self.native.threads

    @property
    def lane(self) -> _native.Lane:
        """The thread that submitted calls run from, in order; started by the first of them."""
        with self._starting:
            if self._lane is None:
                self._lane = _native.Lane()
            return self._lane


class ExpertRun:
    """One call that runs beside the caller; made by `ExpertLayer.submit` and `ExpertLayer.prepare`.

    It keeps its arrays alive, and can be started again after it has ended: it reads them anew each time.

    Attributes:
        address: what the C functions `void (*)(void *)` at `start_address` and `wait_address` take, for callbacks on a
            device's stream. Such callbacks take no interpreter lock.
    """

    start_address = _native.Lane.start_address
    wait_address = _native.Lane.wait_address

    def __init__(self, job: _native.Job, rows: Floats, out: Any, example: Any, inputs: tuple[Any, ...]) -> None:
        self._inputs = inputs  # the job reads their memory
        self._rows = rows
        self._out = out
        self._example = example
        self._job = job
        self.address = job.address

    @property
    def done(self) -> bool:
        """Whether it is not running."""
        return self._job.done

    def start(self) -> ExpertRun:
        """Queue it; returns at once. Inputs and `out` must stay untouched until it has ended."""
        self._job.start()
        return self

    def wait(self) -> Any:
        """The result, as `ExpertLayer.__call__` returns it. Blocks without the interpreter lock.

        Raises:
            ValueError: what the call was given does not fit; the text of the native error.
        """
        self._job.wait()
        if self._job.error:
            raise ValueError(self._job.error)
        return finish(self._rows, self._out, self._example)

    def __del__(self) -> None:
        job = getattr(self, "_job", None)
        if job is not None:
            job.wait()  # the arrays must not go before it has ended


def result_rows(out: Any, rows: Floats) -> Floats:
    """Where the native call writes: `out` itself if it is float32 and contiguous, else a new array."""
    if out is None:
        return np.empty_like(rows)
    if expert_arrays.shape_of(out) != rows.shape:
        raise ValueError(f"out must be {list(rows.shape)}, not {list(out.shape)}")
    if expert_arrays.is_torch(out):
        if out.device.type != "cpu" or not out.is_floating_point():
            raise TypeError(f"out must hold floating-point numbers on the CPU, not {out.dtype} on {out.device}")
        direct: Floats = out.detach().numpy() if str(out.dtype) == "torch.float32" else np.empty_like(rows)
    else:
        direct = out if out.dtype == np.float32 else np.empty_like(rows)
    plain = direct.flags.c_contiguous and direct.flags.writeable and not np.may_share_memory(direct, rows)
    return direct if plain else np.empty_like(rows)


def finish(result: Floats, out: Any, x: Any) -> Any:
    """What a call returns: `out`, or the rows as x's kind of array."""
    if out is None:
        return expert_arrays.like(result, x)
    own = out.detach().data_ptr() if expert_arrays.is_torch(out) else out.ctypes.data
    if own != result.ctypes.data:
        expert_arrays.copy_into(out, result)
    return out
