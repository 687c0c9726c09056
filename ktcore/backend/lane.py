"""A lane: one thread that runs host jobs in order, fed from device streams through short C callbacks."""

from __future__ import annotations

import ctypes
import queue
import threading
import weakref
from collections.abc import Callable
from typing import Protocol

_CALLBACK = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


class LaneJob(Protocol):
    """One piece of host work that a stream starts and later waits for; it may run many times."""

    @property
    def address(self) -> int:
        """The `data` of the lane's callbacks; valid for as long as this object lives."""

    @property
    def done(self) -> bool:
        """Whether the last run has ended; True before the first."""

    @property
    def error(self) -> BaseException | str | None:
        """What the last run raised, or its message; nothing when it went well. Never thrown inside a callback."""

    def start(self) -> None:
        """Queue the job from the host."""

    def wait(self) -> None:
        """Block until the run has ended, without the interpreter lock."""


class Lane(Protocol):
    """Runs jobs one after the other. One an engine and host device; jobs of all layers share it.

    `start_address` and `wait_address` are C functions `void (*)(void *)` for `DeviceRuntime.launch_host`.
    """

    @property
    def start_address(self) -> int:
        """Queues the job at `data`."""

    @property
    def wait_address(self) -> int:
        """Blocks until the job at `data` is done."""

    def job(self, work: Callable[[], None]) -> LaneJob:
        """A job that calls `work` on the lane's thread."""

    def close(self) -> None:
        """Finish what is queued and end the thread."""


class ThreadJob:
    """A job of `ThreadLane`."""

    def __init__(self, lane: ThreadLane, work: Callable[[], None]) -> None:
        self.error: BaseException | None = None
        self.address = 0
        self._lane = lane
        self._work = work
        self._done = threading.Event()
        self._done.set()

    @property
    def done(self) -> bool:
        """Whether the last run has ended."""
        return self._done.is_set()

    def start(self) -> None:
        """Queue the job."""
        self._done.clear()
        self._lane.put(self)

    def wait(self) -> None:
        """Block until the run has ended."""
        self._done.wait()

    def run(self) -> None:
        """Do the work, keep its error, let waiters go on."""
        self.error = None
        try:
            self._work()
        except BaseException as error:  # carried to whoever waits: a lane must outlive any job
            self.error = error
        finally:
            self._done.set()


class ThreadLane:
    """A lane in plain Python: right for any work, at some ten microseconds a hop. Its callbacks hold the interpreter
    lock for a moment only, and give it up while they block."""

    def __init__(self) -> None:
        self._jobs: weakref.WeakValueDictionary[int, ThreadJob] = weakref.WeakValueDictionary()
        self._last = 0
        self._queue: queue.SimpleQueue[ThreadJob | None] = queue.SimpleQueue()
        self._start = _CALLBACK(lambda number: self._find(number, ThreadJob.start))
        self._wait = _CALLBACK(lambda number: self._find(number, ThreadJob.wait))
        self.start_address = ctypes.cast(self._start, ctypes.c_void_p).value or 0
        self.wait_address = ctypes.cast(self._wait, ctypes.c_void_p).value or 0
        self._thread = threading.Thread(target=self._loop, name="ktcore-lane", daemon=True)
        self._thread.start()

    def job(self, work: Callable[[], None]) -> ThreadJob:
        """A job that calls `work`."""
        job = ThreadJob(self, work)
        self._last += 1
        job.address = self._last
        self._jobs[self._last] = job
        return job

    def put(self, job: ThreadJob) -> None:
        """Queue a job."""
        self._queue.put(job)

    def close(self) -> None:
        """Finish what is queued and end the thread."""
        self._queue.put(None)
        self._thread.join()

    def _find(self, number: int, call: Callable[[ThreadJob], None]) -> None:
        # a job that is gone has been waited for already
        job = self._jobs.get(number)
        if job is not None:
            call(job)

    def _loop(self) -> None:
        while (job := self._queue.get()) is not None:
            job.run()
