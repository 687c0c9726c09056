"""The pool, the choice of instruction set, and the read measurement."""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from ktcore_cpu import _native

from .blocks import random_blocks, run_linear


def test_scalar_is_always_there_and_the_best_is_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("KTCORE_ISA", raising=False)
    assert _native.isa_supported()[0] == "scalar"
    assert _native.isa_selected() == _native.isa_supported()[-1]


def test_flags_agree_with_the_system() -> None:
    with open("/proc/cpuinfo", encoding="ascii") as file:
        flags = next((line for line in file if line.startswith("flags")), "").split()
    assert set(_native.cpu_flags()) <= set(flags)
    assert ("avx512" in _native.isa_supported()) == ({"avx512_vnni", "avx512bw", "avx512vl", "avx512dq"} <= set(flags))


@pytest.mark.parametrize("name", ["sse9", "AVX2", "neon"])
def test_an_unknown_instruction_set_is_refused(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv("KTCORE_ISA", name)
    with pytest.raises(ValueError, match=f"{name} is not known"):
        _native.Pool(1)
    with pytest.raises(ValueError, match=name):
        _native.isa_selected()


def test_the_environment_decides_in_a_fresh_process() -> None:
    for isa in ("scalar", _native.isa_supported()[-1]):
        code = "from ktcore_cpu import _native; print(_native.isa_selected())"
        environment = os.environ | {"KTCORE_ISA": isa, "PYTHONPATH": os.pathsep.join(sys.path)}
        out = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
        assert out.stdout.strip() == isa


def test_threads_default_to_the_cpus_allowed() -> None:
    assert 1 <= _native.Pool().threads <= len(os.sched_getaffinity(0))
    assert _native.Pool(3).threads == 3
    cpus = sorted(os.sched_getaffinity(0))
    assert _native.Pool(cpus=cpus).threads == len(cpus)


def test_bad_pools_are_refused() -> None:
    for threads in (-1, 5000):
        with pytest.raises(ValueError, match="threads"):
            _native.Pool(threads)
    with pytest.raises(ValueError, match="CPU 9999"):
        _native.Pool(cpus=[9999])
    with pytest.raises(ValueError, match="cpus"):
        _native.Pool(2, [min(os.sched_getaffinity(0))])


def test_many_short_regions_lose_no_item() -> None:
    for threads in (2, 3, 8):
        pool = _native.Pool(threads)
        w = _native.PackedMatrix.pack(pool, "Q8_0", 320, 32, random_blocks("Q8_0", 320, 32))
        x = np.ones((1, 32), np.float32)
        want = run_linear(_native.Pool(1), w, x)
        for _ in range(1500):
            np.testing.assert_array_equal(run_linear(pool, w, x), want)


def test_one_pool_serves_several_python_threads_one_after_the_other() -> None:
    pool = _native.Pool(2)
    w = _native.PackedMatrix.pack(pool, "Q4_1", 96, 64, random_blocks("Q4_1", 96, 64))
    xs = np.random.default_rng(0).standard_normal((8, 9, 64)).astype(np.float32)
    wants = [run_linear(pool, w, x) for x in xs]
    with ThreadPoolExecutor(8) as executor:
        for _ in range(20):
            for got, want in zip(executor.map(lambda x: run_linear(pool, w, x), xs), wants, strict=True):
                np.testing.assert_array_equal(got, want)


def test_read_bandwidth_is_plausible() -> None:
    assert 1e8 < _native.read_bandwidth(_native.Pool(), 0.05) < 1e13
    with pytest.raises(ValueError, match="seconds"):
        _native.read_bandwidth(_native.Pool(1), 0)
