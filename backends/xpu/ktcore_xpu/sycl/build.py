"""Builds the shim between Python and the SYCL runtime by the system's C++ compiler, once for each runtime."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

from ktcore.errors import BackendError
from ktcore_xpu.sycl.home import SyclHome, find_home

SOURCE = Path(__file__).with_name("shim.cpp")
FLAGS = ("-std=c++17", "-O2", "-shared", "-fPIC", "-w")
NO_COMPILER = "the SYCL kernels need a C++ compiler once, and there is none: install g++ or set CXX"


def shim_library(home: SyclHome) -> Path:
    """Path of the shim for that runtime; builds it when the cache has none.

    Raises:
        BackendError: there is no C++ compiler, or it fails.
    """
    target = _target(home)
    if target.exists():
        return target
    compiler = _compiler()
    if compiler is None:
        raise BackendError(NO_COMPILER)
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        built = Path(folder) / "shim.so"
        command = [compiler, *FLAGS, f"-I{home.include}", str(SOURCE), "-o", str(built), f"-L{home.lib}", "-lsycl"]
        done = subprocess.run([*command, f"-Wl,-rpath,{home.lib}"], capture_output=True, text=True, check=False)
        if done.returncode:
            raise BackendError(f"{compiler} does not build the SYCL shim: {_errors(done.stderr)}", " ".join(command))
        # another process may have been quicker: either file is right
        os.replace(built, target)
    return target


def why_unavailable() -> str | None:
    """What is missing to compile SYCL kernels here, in words; None: nothing."""
    try:
        home = find_home()
    except BackendError as error:
        return str(error)
    return NO_COMPILER if _compiler() is None and not _target(home).exists() else None


def cache_folder() -> Path:
    """`$XDG_CACHE_HOME/ktcore/sycl`, or `~/.cache/ktcore/sycl`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ktcore" / "sycl"


def _target(home: SyclHome) -> Path:
    parts = (SOURCE.read_bytes(), str(home.root).encode(), home.version.encode(), " ".join(FLAGS).encode())
    key = hashlib.sha256(b"\0".join(parts)).hexdigest()
    return cache_folder() / f"shim-{key[:24]}.so"


def _compiler() -> str | None:
    return os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++")


def _errors(output: str) -> str:
    lines = [line for line in output.splitlines() if "error" in line] or output.splitlines()
    return "; ".join(lines[:3]) or "no message"
