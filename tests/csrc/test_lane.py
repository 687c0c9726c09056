"""The native lane: order, replay through its C callbacks, errors as text, and an end that finishes what is queued."""

from __future__ import annotations

import ctypes
import threading

import pytest
from ktcore_cpu import _native

CALLBACK = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


def test_jobs_run_in_the_order_they_were_started() -> None:
    lane = _native.Lane()
    seen: list[int] = []
    jobs = [lane.job(lambda i=i: seen.append(i)) for i in range(200)]
    for job in jobs:
        job.start()
    jobs[-1].wait()
    assert seen == list(range(200))
    assert all(job.done for job in jobs)


def test_callbacks_run_a_job_again_at_every_replay() -> None:
    lane = _native.Lane()
    runs: list[int] = []
    job = lane.job(lambda: runs.append(threading.get_ident()))
    start, wait = CALLBACK(lane.start_address), CALLBACK(lane.wait_address)
    for expected in range(1, 50):
        start(job.address)
        wait(job.address)
        assert len(runs) == expected
    assert set(runs) != {threading.get_ident()}


def test_waiting_does_not_hold_the_interpreter_lock() -> None:
    lane = _native.Lane()
    go = threading.Event()
    job = lane.job(lambda: go.wait(10))
    job.start()
    threading.Timer(0.05, go.set).start()
    job.wait()
    assert go.is_set()
    assert job.error == ""


def test_an_error_stays_in_its_job_and_the_lane_goes_on() -> None:
    lane = _native.Lane()

    def fail() -> None:
        raise ValueError("expert 3 is on fire")

    bad, good = lane.job(fail), lane.job(lambda: None)
    bad.start()
    good.start()
    good.wait()
    assert "expert 3 is on fire" in bad.error
    assert good.error == ""
    bad.start()
    bad.wait()
    assert "on fire" in bad.error


@pytest.mark.parametrize("explicit", [True, False])
def test_the_end_finishes_what_is_queued(explicit: bool) -> None:
    lane = _native.Lane()
    seen: list[int] = []
    jobs = [lane.job(lambda i=i: seen.append(i)) for i in range(20)]
    for job in jobs:
        job.start()
    if explicit:
        lane.close()
        lane.close()
    else:
        jobs.clear()
        del job, lane
    assert seen == list(range(20))
