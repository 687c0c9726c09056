"""The quantised product built for the host (csrc/emulate.h), and as a stand-in library on the simulated device."""

from __future__ import annotations

import ctypes
import hashlib
import os
import subprocess
from pathlib import Path
from typing import Any

from ktcore_triton.native.build import KERNEL, SOURCE, Gemm, typed
from ktcore_triton.native.fragments import Fragments

BUILD = Path(__file__).parents[2] / "build" / "emulated"
BASE = 0x5000_0000  # of the stand-ins' stream addresses


def emulated(fragments: Fragments) -> ctypes.CDLL:
    """The library with those fragments, built by the host's compiler unless this very source has been built before."""
    digest = hashlib.sha256(b"".join(p.read_bytes() for p in sorted(SOURCE.iterdir()))).hexdigest()[:16]
    path = BUILD / f"libktcore_{fragments.name}-{digest}.so"
    if not path.is_file():
        BUILD.mkdir(parents=True, exist_ok=True)
        made = path.with_suffix(f".{os.getpid()}")
        flags = [
            "-std=c++20",
            "-O2",
            "-shared",
            "-fPIC",
            "-DKT_EMULATE",
            fragments.macro,
            "-Wall",
            "-Wextra",
            "-Werror",
        ]
        flags += ["-Wno-unknown-pragmas", "-x", "c++"]
        compiler = os.environ.get("CXX", "c++")
        command = [compiler, *flags, str(KERNEL), "-o", str(made)]
        subprocess.run(command, check=True, capture_output=True, text=True)
        made.replace(path)
    return typed(ctypes.CDLL(str(path)))


class Library:
    """The library as a backend calls it, on the simulated device: a call is a task of the stream that it names.

    Args:
        runtime: of the simulated device.
        fragments: of the simulated chip.
    """

    def __init__(self, runtime: Any, fragments: Fragments) -> None:
        self._native = runtime._native
        self._index = runtime.device.index
        self._host = emulated(fragments)
        self.calls = 0

    def ktcore_gemm(self, call: Gemm, stream: int) -> int:
        """As the C function; addresses are the device's, which only the task may turn into memory."""
        given = Gemm.from_buffer_copy(call)
        self.calls += 1

        def kernel() -> None:
            for name in Gemm.POINTERS:
                if there := getattr(given, name):
                    setattr(given, name, self._native.alias_address(self._index, there))
            error = self._host.ktcore_gemm(given, None)
            if error:
                raise RuntimeError(f"the kernel returned {error}")

        number = (stream - BASE) & 0xFFFFF
        self._native.launch_python(self._index, number, kernel, [], "ktcore_gemm")
        return 0

    def ktcore_error(self, code: int) -> bytes:
        """Of the emulation."""
        return bytes(self._host.ktcore_error(code))
