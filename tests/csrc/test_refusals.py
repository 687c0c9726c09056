"""What does not fit is a Python exception, never a crash: memory, addresses, dtypes, tables, closed lanes, forks."""

from __future__ import annotations

import os
import subprocess
import sys
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ktcore_cpu import _native

from .blocks import random_blocks, run_linear
from .test_attention import Layer, hidden_rows, ints
from .test_experts import batch, make_bank

HUGE = (1 << 30) - 32


def in_a_process(code: str) -> str:
    """Standard output of a fresh interpreter, which must end well."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("experts", [1, 1000, 1 << 20])
def test_a_bank_beyond_all_memory_is_a_memory_error(experts: int) -> None:
    with pytest.raises(MemoryError):
        _native.ExpertBank(experts, HUGE, HUGE, "F32", "F32", "F32")


@pytest.mark.skipif("libasan" in os.environ.get("LD_PRELOAD", ""), reason="the sanitizer's own memory breaks the limit")
def test_no_memory_left_is_a_memory_error_and_the_pool_lives_on() -> None:
    code = """
import resource
import numpy as np
from ktcore_cpu import _native

pool = _native.Pool(2)
raw = np.zeros((320, 34 * 32), np.uint8)
small = _native.PackedMatrix.pack(pool, "Q8_0", 320, 1024, raw)
x = np.ones((60000, 1024), np.float32)
out = np.empty((60000, 320), np.float32)
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (30 << 20), resource.RLIM_INFINITY))
refused = []
for name, call in {
    "scratch": lambda: _native.linear(pool, small, x.ctypes.data, out.ctypes.data, 60000),
    "bank": lambda: _native.ExpertBank(64, 2048, 2048, "Q8_0", "Q8_0", "Q8_0"),
    "read": lambda: _native.read_bandwidth(pool, 0.01),
}.items():
    try:
        call()
    except MemoryError:
        refused.append(name)
_native.linear(pool, small, x.ctypes.data, out.ctypes.data, 8)
assert (out[:8] == 0).all()
print(*refused)
"""
    assert in_a_process(code).split() == ["scratch", "bank", "read"]


def test_null_and_misaligned_addresses_are_refused() -> None:
    pool = _native.Pool(1)
    x = np.zeros((4, 256), np.float32)
    at = x.ctypes.data
    bank, _ = make_bank(pool, ("Q8_0",) * 3, 2, 256, 256)
    experts = _native.ExpertsBlock(pool, bank)
    w = _native.PackedMatrix.pack(pool, "Q8_0", 256, 256, random_blocks("Q8_0", 256, 256))
    mlp = _native.MLPBlock(pool, w, w, w)
    step, layer = _native.Step(ints([0]), ints([0, 1]), ints([1]), ints([[0]])), Layer().build(pool)
    for bad in (0, at + 1, at + 2):
        for call in (
            lambda bad=bad: _native.linear(pool, w, bad, at, 1),
            lambda bad=bad: _native.linear(pool, w, at, bad, 1),
            lambda bad=bad: mlp.forward(bad, at, 1),
            lambda bad=bad: mlp.forward(at, bad, 1),
            lambda bad=bad: experts.forward(bad, at, at, at + 4096, 1, 2),
            lambda bad=bad: experts.forward(at, bad, at, at + 4096, 1, 2),
            lambda bad=bad: experts.forward(at, at, bad, at + 4096, 1, 2),
            lambda bad=bad: experts.forward(at, at, at, bad, 1, 2),
            lambda bad=bad: layer.block.forward(bad, at, step, at, at, 1, 16, "f32"),
            lambda bad=bad: layer.block.forward(at, at, step, bad, at, 1, 16, "f32"),
            lambda bad=bad: layer.block.forward(at, at, step, at, bad, 1, 16, "f32"),
            lambda bad=bad: _native.rms_norm(pool, bad, np.ones(256, np.float32), 1e-5, at, 1),
        ):
            with pytest.raises(ValueError, match="address"):
                call()
    with pytest.raises(TypeError):
        _native.linear(pool, w, -1, at, 1)


def test_wrong_dtypes_are_refused() -> None:
    floats = np.zeros(2, np.float32)
    for bad in (floats, np.zeros(2, np.float64)):
        with pytest.raises(TypeError):
            _native.Step(bad, ints([0, 1]), ints([1]), ints([[0]]))
    pool = _native.Pool(1)
    with pytest.raises(ValueError, match="bytes"):
        _native.PackedMatrix.pack(pool, "F32", 1, 2, floats)
    with pytest.raises(TypeError):
        _native.PackedMatrix.pack(pool, "F32", 1, 2, "text")
    for kind in ("f64", "F16", ""):
        with pytest.raises(ValueError, match="cache type"):
            step = _native.Step(ints([0]), ints([0, 1]), ints([1]), ints([[0]]))
            at = floats.ctypes.data
            Layer().build(pool).block.forward(at, at, step, at, at, 1, 1, kind)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([0], [0, 1], [1], [0]), "block_table"),
        (([0], [0, 1], [1], [[0], [0]]), "block_table"),
        (([0], [0, 1], [1, 1], [[0], [0]]), "q_start"),
        (([0], [0], [], np.zeros((0, 1))), "q_start"),
        (([0], [1, 1], [1], [[0]]), "q_start"),
        (([0], [0, 2], [2], [[0]]), "q_start"),
        (([0, 1], [0, 2, 1, 2], [2, 2, 2], [[0]] * 3), "q_start"),
        (([0, 1], [0, 2], [1], [[0]]), "context length 1"),
        (([0], [0, 1], [-1], [[0]]), "context length -1"),
        (([0], [0, 1], [1 << 30], [[0]]), "context length"),
        (([-1], [0, 1], [1], [[0]]), "positions"),
        (([[0]], [0, 1], [1], [[0]]), "positions"),
    ],
)
def test_steps_that_contradict_themselves_are_refused(arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        _native.Step(*map(ints, arguments))


@pytest.mark.parametrize(
    ("table", "context", "message"),
    [([[0]], 33, "does not fit its 1 pages"), ([[40]], 3, "page 40"), ([[-1]], 3, "page -1"), ([[]], 3, "0 pages")],
)
def test_tables_that_do_not_hold_the_context_are_refused(table: list[list[int]], context: int, message: str) -> None:
    pool = _native.Pool(1)
    layer = Layer().build(pool)
    x = hidden_rows(1, layer.hidden)
    step = _native.Step(ints([context - 1]), ints([0, 1]), ints([context]), ints(table).reshape(1, -1))
    with pytest.raises(ValueError, match=message):
        layer.run(x, step)


def test_unknown_experts_and_repeated_or_missing_packing_are_refused() -> None:
    pool = _native.Pool(1)
    bank, _ = make_bank(pool, ("Q8_0",) * 3, 2, 64, 64)
    x, ids, weights = batch(3, 64, 2, 2)
    ids[1, 1] = 2
    block = _native.ExpertsBlock(pool, bank)
    out = np.zeros_like(x)
    with pytest.raises(ValueError, match="expert 2"):
        block.forward(x.ctypes.data, ids.ctypes.data, weights.ctypes.data, out.ctypes.data, 3, 2)
    raw = random_blocks("Q8_0", 64, 64)
    with pytest.raises(ValueError, match="packed already"):
        bank.pack(pool, 1, raw, raw, raw)
    for expert in (-1, 2, 1 << 40):
        with pytest.raises(ValueError, match="no expert"):
            bank.pack(pool, expert, raw, raw, raw)
    empty = _native.ExpertBank(2, 64, 64, "Q8_0", "Q8_0", "Q8_0")
    with pytest.raises(ValueError, match="0 of 2"):
        _native.ExpertsBlock(pool, empty)
    with pytest.raises(ValueError, match="raw data"):
        empty.pack(pool, 0, raw, raw[:-1], raw)
    with pytest.raises(ValueError, match="contiguous"):
        empty.pack(pool, 0, raw, raw.T, raw)


def test_weights_outlive_the_arrays_and_pools_they_came_from() -> None:
    raw = random_blocks("Q8_0", 32, 32)
    pool = _native.Pool(2)
    w = _native.PackedMatrix.pack(pool, "Q8_0", 32, 32, raw)
    want = w.dequantize()
    block = _native.MLPBlock(pool, w, w, w)
    raw[:] = 0
    del pool, raw
    np.testing.assert_array_equal(w.dequantize(), want)
    x, out = np.ones((1, 32), np.float32), np.full((1, 32), np.nan, np.float32)
    del w
    block.forward(x.ctypes.data, out.ctypes.data, 1)
    assert np.isfinite(out).all()


def test_a_closed_lane_takes_no_more_jobs() -> None:
    lane = _native.Lane()
    job = lane.job(lambda: None)
    lane.close()
    lane.close()
    with pytest.raises(RuntimeError, match="closed"):
        job.start()
    assert job.done


def test_a_program_may_end_while_its_jobs_run() -> None:
    code = """
import time
from ktcore_cpu import _native

lane = _native.Lane()
jobs = [lane.job(lambda: time.sleep(0.2)) for _ in range(3)]
for job in jobs:
    job.start()
print("end")
"""
    assert in_a_process(code) == "end\n"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_child_is_told_what_to_do() -> None:
    code = """
import os, sys
import numpy as np
from ktcore_cpu import _native

raw = np.zeros((320, 34), np.uint8)
pool, lane = _native.Pool(3), _native.Lane()
w = _native.PackedMatrix.pack(pool, "Q8_0", 320, 32, raw)
job = lane.job(lambda: None)
x, out = np.ones((1, 32), np.float32), np.empty((1, 320), np.float32)
run = lambda pool: _native.linear(pool, w, x.ctypes.data, out.ctypes.data, 1)
say = lambda line: os.write(1, (line + "\\n").encode())  # whole lines: two processes write
run(pool)
child = os.fork()
assert child == 0 or os.waitpid(child, 0)[1] == 0  # one after the other: their lines must not mix
for call in (lambda: run(pool), job.start):
    try:
        call()
        say("ran")
    except RuntimeError as error:
        say("fork" if "fork" in str(error) or "process that made it" in str(error) else str(error))
if child == 0:
    run(_native.Pool(2))  # a pool of its own works
    del pool, lane, job  # and ending does not wait for threads that are elsewhere
    say("child well")
    sys.exit(0)
"""
    assert in_a_process(code).split("\n") == ["fork", "fork", "child well", "ran", "ran", ""]


def test_far_more_threads_than_cpus_are_refused() -> None:
    cpus = len(os.sched_getaffinity(0))
    with pytest.raises(ValueError, match=f"not {100 * cpus}: this process may use {cpus} CPU"):
        _native.Pool(100 * cpus)


@pytest.mark.parametrize(
    ("files", "want"),
    [
        ({}, 0),
        ({"proc/self/cgroup": "0::/\n"}, 0),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "max 100000\n"}, 0),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "150000 100000\n"}, 1.5),
        ({"proc/self/cgroup": "0::/a/b\n", "sys/fs/cgroup/a/cpu.max": "300000 100000"}, 3),
        (
            {
                "proc/self/cgroup": "0::/a/b\n",
                "sys/fs/cgroup/a/b/cpu.max": "800000 100000",
                "sys/fs/cgroup/a/cpu.max": "50000 100000",
            },
            0.5,
        ),
        ({"proc/self/cgroup": "0::/host/only\n", "sys/fs/cgroup/cpu.max": "200000 100000"}, 2),
        (
            {
                "proc/self/cgroup": "5:memory:/m\n4:cpu,cpuacct:/docker/x\n",
                "sys/fs/cgroup/cpu,cpuacct/docker/x/cpu.cfs_quota_us": "400000",
                "sys/fs/cgroup/cpu,cpuacct/docker/x/cpu.cfs_period_us": "100000",
            },
            4,
        ),
        (
            {
                "proc/self/cgroup": "4:cpu:/\n",
                "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1",
                "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000",
            },
            0,
        ),
        ({"proc/self/cgroup": "nonsense\n0:\n::\n", "sys/fs/cgroup/cpu.max": "x y z"}, 0),
    ],
)
def test_the_quota_of_the_control_groups_is_read(tmp_path: Path, files: dict[str, str], want: float) -> None:
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert _native.cpu_quota(str(tmp_path)) == want


def test_the_default_keeps_to_the_quota() -> None:
    quota = _native.cpu_quota()
    assert quota == 0 or _native.Pool().threads <= np.ceil(quota)


@pytest.mark.parametrize(
    ("files", "counted"),
    [
        ({"cpu_capacity": (1024, 400)}, True),
        ({"cpu_capacity": (1024, 300)}, False),  # less than a third: waited for longer than it helps
        ({"acpi_cppc/highest_perf": (70, 20), "cpufreq/cpuinfo_max_freq": (1, 1)}, False),
        ({"cpufreq/cpuinfo_max_freq": (5200000, 3800000)}, True),
        ({}, True),
    ],
)
def test_the_default_leaves_out_cores_that_save_power(
    tmp_path: Path, files: dict[str, tuple[int, int]], counted: bool
) -> None:
    first, *others = sorted(os.sched_getaffinity(0))
    for name, (best, rest) in files.items():
        for cpu in (first, *others):
            path = tmp_path / f"sys/devices/system/cpu/cpu{cpu}" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(f"{best if cpu == first else rest}\n")
    assert _native.default_threads(str(tmp_path)) == (1 + len(others) if counted else 1)


def test_a_pool_shared_by_forward_and_packing_stays_right() -> None:
    pool = _native.Pool(2)
    raw = random_blocks("Q8_0", 320, 64)
    w = _native.PackedMatrix.pack(pool, "Q8_0", 320, 64, raw)
    x = np.ones((3, 64), np.float32)
    want = run_linear(pool, w, x)
    for _ in range(50):
        again = _native.PackedMatrix.pack(pool, "Q8_0", 320, 64, raw)
        np.testing.assert_array_equal(run_linear(pool, again, x), want)


def test_a_queued_job_keeps_the_memory_that_it_reads_and_writes() -> None:
    pool, lane = _native.Pool(1), _native.Lane()
    bank, _ = make_bank(pool, ("Q8_0",) * 3, 2, 64, 64)
    x, ids, weights = batch(3, 64, 2, 2)
    arrays = [x.copy(), ids.copy(), weights.copy(), np.empty_like(x)]
    held = [weakref.ref(a) for a in arrays]
    block = _native.ExpertsBlock(pool, bank)
    job = lane.experts_job(block, *(a.ctypes.data for a in arrays), 3, 2, owners=tuple(arrays))
    wanted = np.empty_like(x)
    block.forward(*(a.ctypes.data for a in arrays[:3]), wanted.ctypes.data, 3, 2)
    del arrays
    job.start()
    job.wait()
    assert job.error == ""
    out = held[3]()
    assert out is not None
    np.testing.assert_array_equal(out, wanted)
    del job, out
    assert all(ref() is None for ref in held)
    with pytest.raises(TypeError):
        lane.experts_job(block, 8, 8, 8, 8, 3, 2)  # type: ignore[call-arg]
