"""Decode speed of the pool beside another busy process: it should fall in proportion, not collapse.

    python benchmarks/competitor.py [--threads N] [--competitors 1]

Many short regions (a 4-bit matrix of 4096 x 4096 times one token), alternately alone and beside processes that each
keep one CPU busy. With c competitors on n CPUs a fair share is n / (n + c) of the quiet speed.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import statistics
import time
from multiprocessing.synchronize import Event as EventType

import numpy as np
from ktcore_cpu import _native


def spin(go: EventType) -> None:
    """Keeps one CPU busy for as long as the event is set."""
    while True:
        go.wait()
        for _ in range(10000):
            pass


def speed(pool: _native.Pool, w: _native.PackedMatrix, seconds: float) -> float:
    """Calls a second."""
    x, out = np.ones((1, w.cols), np.float32), np.empty((1, w.rows), np.float32)
    calls, end = 0, time.perf_counter() + seconds
    start = time.perf_counter()
    while time.perf_counter() < end:
        _native.linear(pool, w, x.ctypes.data, out.ctypes.data, 1)
        calls += 1
    return calls / (time.perf_counter() - start)


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--competitors", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    context = multiprocessing.get_context("spawn")
    go = context.Event()
    others = [context.Process(target=spin, args=(go,), daemon=True) for _ in range(options.competitors)]
    for other in others:
        other.start()
    pool = _native.Pool(options.threads)
    raw = np.random.default_rng(0).integers(0, 256, (4096, 4096 // 32 * 18), dtype=np.uint8)
    w = _native.PackedMatrix.pack(pool, "Q4_0", 4096, 4096, raw)
    speed(pool, w, 0.5)
    quiet, beside = [], []
    for _ in range(options.rounds):
        quiet.append(speed(pool, w, 1))
        go.set()
        time.sleep(0.1)
        beside.append(speed(pool, w, 1))
        go.clear()
        time.sleep(0.1)
    for other in others:
        other.terminate()
    ratio = statistics.median(b / q for q, b in zip(quiet, beside, strict=True))
    cpus = len(os.sched_getaffinity(0))
    print(
        f"{pool.threads} threads on {cpus} CPUs: {statistics.median(quiet):.0f} calls/s alone, "
        f"{statistics.median(beside):.0f} beside {options.competitors} busy process(es): {ratio:.2f} of it "
        f"(a fair share is {cpus / (cpus + options.competitors):.2f})"
    )


if __name__ == "__main__":
    main()
