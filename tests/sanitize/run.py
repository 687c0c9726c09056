"""Builds the native code with sanitizers and runs its tests under them; `make sanitize` calls it.

    python tests/sanitize/run.py [--all]

Three steps: csrc/tests/threads.cpp with ThreadSanitizer; a probe that the module built with AddressSanitizer and
UndefinedBehaviorSanitizer stops at a write past a buffer; tests/csrc and tests/cpu on it, of the best instruction set,
of AVX2 and of the emulated tiles, or with --all of every one. Python is not instrumented. Without --all the other
units are not built.
"""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
PROBE = """
import numpy as np
import sanitized_module
from ktcore_cpu import _native
pool = _native.Pool(1)
w = _native.PackedMatrix.pack(pool, "F32", 64, 32, np.zeros((64, 128), np.uint8))
x, out = np.ones((1, 32), np.float32), np.empty(63, np.float32)
_native.linear(pool, w, x.ctypes.data, out.ctypes.data, 1)
"""


def build(kind: str, target: str, units: str = "") -> Path:
    """The folder of a build with these sanitizers, and of these units alone (comma-separated; all when empty)."""
    folder = ROOT / "build" / f"sanitize-{kind.replace(',', '-')}"
    pybind = subprocess.run(
        [sys.executable, "-m", "pybind11", "--cmakedir"], check=True, capture_output=True, text=True
    )
    configure = [
        "cmake", "-S", str(ROOT), "-B", str(folder), f"-DKTCORE_SANITIZE={kind}", "-DCMAKE_BUILD_TYPE=Release",
        f"-DPython_EXECUTABLE={sys.executable}", f"-Dpybind11_DIR={pybind.stdout.strip()}",
        f"-DKTCORE_UNITS={units.replace(',', ';')}",
    ]  # fmt: skip
    jobs = str(min(8, os.cpu_count() or 1))
    step(f"building {target} with -fsanitize={kind}: minutes on two cores, seconds when nothing has changed")
    for command in (configure, ["cmake", "--build", str(folder), "--target", target, "-j", jobs]):
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        if done.returncode != 0:
            sys.exit(f"sanitize: {' '.join(command)} failed:\n{done.stdout[-4000:]}")
    return folder / "csrc"


def step(what: str) -> None:
    """One line of progress, as the Makefile's."""
    print(f"==> {what}", flush=True)


def library(name: str) -> str:
    """Where the compiler keeps a library that must be loaded before the interpreter's own."""
    compiler = os.environ.get("CXX", "c++")
    done = subprocess.run([compiler, f"-print-file-name={name}"], capture_output=True, text=True, check=True)
    path = done.stdout.strip()
    return path if os.path.isabs(path) else ""


def address(units: str) -> None:
    """Kernel tests with every access and every conversion checked; units: instruction sets, all when empty."""
    built = next(build("address,undefined", "_native", units).glob("_native*.so"))
    environment = os.environ | {
        "KTCORE_NATIVE": str(built),
        "PYTHONPATH": os.pathsep.join([str(HERE), *filter(None, [os.environ.get("PYTHONPATH")])]),
        # libstdc++ beside it: the sanitizer wraps its throw, and must find it before Python loads a module that throws
        "LD_PRELOAD": f"{library('libasan.so')} {library('libstdc++.so')}",
        # The interpreter frees little of what it holds when it ends: leaks are all its own.
        "ASAN_OPTIONS": "detect_leaks=0:allocator_may_return_null=1",
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "KTCORE_SANITIZE_UNITS": units,
        "OMP_NUM_THREADS": "1",  # of torch, which computes what kernels are compared with: every core has a worker
    }
    probe = subprocess.run([sys.executable, "-c", PROBE], env=environment, capture_output=True, text=True)
    if "ERROR: AddressSanitizer" not in probe.stderr:
        sys.exit(f"sanitize: a write past a buffer was not noticed:\n{probe.stdout}{probe.stderr}")
    # Not what looks at the other build's instructions, at the memory's speed, or at memory that the sanitizer fills;
    # nor which units a CPU has, of which this build may be without some; nor how close results are after many more
    # calls of the same shapes, which another build does not change; nor a child of fork(): a thread that it makes can
    # wait for ever on the sanitizer's own lock, which a thread of its parent held (seen with gcc 12's).
    tests = [
        "tests/csrc",
        "tests/cpu",
        "--ignore=tests/csrc/test_opcodes.py",
        "--ignore=tests/csrc/test_isa.py",
        "--deselect=tests/csrc/test_pool.py::test_flags_agree_with_the_system",
        "--ignore=tests/cpu/test_load_memory.py",
        "--ignore=tests/cpu/test_accuracy.py",
        "--ignore=tests/cpu/test_python_share.py",
        "--deselect=tests/csrc/test_attention.py::test_eight_bit_cache_is_close_at_long_context",
        "--deselect=tests/csrc/test_pool.py::test_read_bandwidth_is_plausible",
        "--deselect=tests/csrc/test_refusals.py::test_a_forked_child_is_told_what_to_do",
        "--deselect=tests/csrc/test_numa.py::test_pages_are_bound_and_found",
    ]
    step(f"kernel tests under both on {units or 'every instruction set'}: three minutes on two cores")
    workers = ["-n", str(min(8, os.cpu_count() or 1)), "--dist", "worksteal"]
    plugins = ["-p", "sanitized_module", "-p", "no:cacheprovider"]
    command = [sys.executable, "-m", "pytest", "-q", "-x", *plugins, *workers, *tests]
    if subprocess.run(command, env=environment, cwd=ROOT).returncode != 0:
        sys.exit("sanitize: the kernel tests failed under AddressSanitizer and UndefinedBehaviorSanitizer")


def quick_units() -> str:
    """The best instruction set here, AVX2, whose vectors are two registers, and the emulated tiles."""
    from ktcore_cpu import _native

    best = _native.isa_supported()[-1]
    below = ["avx512_bf16"] if best == "amx" else []  # whose kernels it takes for all but tiles
    return ",".join(dict.fromkeys([best, *below, "avx2", *_native.isa_emulated()]))


def threads() -> None:
    """What threads share, with every pair of accesses checked."""
    program = build("thread", "threads") / "threads"
    # ThreadSanitizer's memory map needs addresses that are not shuffled too far on newer kernels.
    wrap = ["setarch", platform.machine(), "-R"] if Path("/usr/bin/setarch").exists() else []
    step("running threads under ThreadSanitizer: a minute or two")
    if subprocess.run([*wrap, str(program)], env=os.environ | {"TSAN_OPTIONS": "halt_on_error=1"}).returncode != 0:
        sys.exit("sanitize: ThreadSanitizer has found something")


if __name__ == "__main__":
    if sys.platform != "linux" or not library("libasan.so") or not library("libtsan.so"):
        print("sanitize: skipped, it needs Linux and a compiler with libasan and libtsan", file=sys.stderr)
        sys.exit(0)
    threads()
    address("" if "--all" in sys.argv[1:] else quick_units())
