"""A lane: one thread that runs host jobs in order, fed from device streams through short C callbacks."""

from __future__ import annotations

import ctypes
import queue
import threading
from collections.abc import Callable

_CALLBACK = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


class Job:
    """One piece of host work that a stream starts and later waits for.

    Attributes:
        error: what the work raised; never thrown inside a driver's callback.
    """

    def __init__(self, work: Callable[[], None]) -> None:
        self.work = work
        self.error: BaseException | None = None
        self._done = threading.Event()

    def run(self) -> None:
        """Do the work, keep its error, let waiters go on."""
        try:
            self.work()
        except BaseException as error:  # carried to whoever waits: a lane must outlive any job
            self.error = error
        finally:
            self._done.set()

    def rearm(self) -> None:
        """Make the job wait-able again, for a captured graph that replays it."""
        self._done.clear()

    def wait(self) -> None:
        """Block until the work has ended."""
        self._done.wait()

    @property
    def done(self) -> bool:
        """Whether the work has ended."""
        return self._done.is_set()


class HostLane:
    """Runs jobs one after the other on a thread of its own. One an engine; jobs of all layers share it.

    `start_address` and `wait_address` are C functions `void (*)(void *)` for `DeviceRuntime.launch_host`; their
    argument is what `register(job)` returned. They take Python's interpreter lock for a moment only; `wait` gives it
    up while it blocks.
    """

    def __init__(self) -> None:
        self._jobs: dict[int, Job] = {}
        self._next = 1
        self._lock = threading.Lock()
        self._queue: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self._start = _CALLBACK(self._on_start)
        self._wait = _CALLBACK(self._on_wait)
        self.start_address = ctypes.cast(self._start, ctypes.c_void_p).value or 0
        self.wait_address = ctypes.cast(self._wait, ctypes.c_void_p).value or 0
        self._thread = threading.Thread(target=self._loop, name="ktcore-lane", daemon=True)
        self._thread.start()

    def register(self, job: Job) -> int:
        """Keep the job alive and give it a number, the `data` of both callbacks."""
        with self._lock:
            number, self._next = self._next, self._next + 1
            self._jobs[number] = job
        return number

    def forget(self, number: int) -> None:
        """Drop a job that no stream will call again."""
        with self._lock:
            self._jobs.pop(number, None)

    def start(self, job: Job) -> None:
        """Queue a job from the host."""
        self._queue.put(job)

    def close(self) -> None:
        """Finish what is queued and end the thread."""
        self._queue.put(None)
        self._thread.join()

    def _on_start(self, number: int) -> None:
        job = self._jobs[number]
        job.rearm()
        self._queue.put(job)

    def _on_wait(self, number: int) -> None:
        job = self._jobs.get(number)
        if job is not None:
            job.wait()

    def _loop(self) -> None:
        while (job := self._queue.get()) is not None:
            job.run()
