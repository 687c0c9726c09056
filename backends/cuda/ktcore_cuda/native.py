"""Builds and loads the package's CUDA library: with nvcc when it is first needed, kept by a hash of its source."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

from ktcore.errors import BackendError

SOURCE = Path(__file__).parent / "csrc"
ARCHITECTURES = (80, 86, 89, 90, 120)
CACHE_VARIABLE = "KTCORE_CUDA_CACHE"
NVCC_VARIABLE = "KTCORE_NVCC"
POINTERS, INTEGERS = 8, 9


def nvcc() -> str | None:
    """The compiler: KTCORE_NVCC, or the one on the path, or that of /usr/local/cuda."""
    found = os.environ.get(NVCC_VARIABLE) or shutil.which("nvcc")
    usual = Path("/usr/local/cuda/bin/nvcc")
    return found or (str(usual) if usual.is_file() else None)


def built() -> Path:
    """Where the library is, or will be: a folder of the user's, or KTCORE_CUDA_CACHE."""
    home = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "ktcore" / "cuda"
    folder = Path(os.environ.get(CACHE_VARIABLE, home))
    digest = hashlib.sha256(repr(ARCHITECTURES).encode())
    for path in sorted(SOURCE.iterdir()):
        digest.update(path.name.encode() + path.read_bytes())
    return folder / f"libktcore_cuda-{digest.hexdigest()[:16]}.so"


def problem() -> str:
    """Why the library cannot be had here; empty when it is built, or can be."""
    if built().is_file() or nvcc() is not None:
        return ""
    return f"its CUDA kernels are not built and there is no nvcc to build them (on the path, or as {NVCC_VARIABLE})"


def status() -> str:
    """The same in a few words, for `ktcore doctor`."""
    if built().is_file():
        return "CUDA kernels built"
    return "CUDA kernels are built by nvcc when first used" if nvcc() else problem()


def command(compiler: str, target: Path, architectures: tuple[int, ...] = ARCHITECTURES) -> list[str]:
    """How the library is built: device code of every architecture, and what later ones can translate."""
    codes = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in architectures]
    codes.append(f"-gencode=arch=compute_{architectures[-1]},code=compute_{architectures[-1]}")
    flags = ["-O3", "-std=c++17", "--shared", "-Xcompiler", "-fPIC", "-cudart", "static", "--threads", "2"]
    return [compiler, *flags, *codes, str(SOURCE / "w4a16.cu"), "-o", str(target)]


@functools.lru_cache(maxsize=1)
def library() -> ctypes.CDLL:
    """The library, built now if it is not yet.

    Raises:
        BackendError: there is no nvcc, or it fails, with its own words.
    """
    path = built()
    if not path.is_file():
        _build(path)
    return typed(ctypes.CDLL(str(path)))


def typed(loaded: ctypes.CDLL) -> ctypes.CDLL:
    """The library with the types of its functions."""
    integers = [ctypes.c_int] * INTEGERS
    loaded.ktcore_gemm.argtypes = [ctypes.c_void_p] * POINTERS + integers + [ctypes.c_void_p]
    loaded.ktcore_gemm.restype = ctypes.c_int
    loaded.ktcore_error.argtypes = [ctypes.c_int]
    loaded.ktcore_error.restype = ctypes.c_char_p
    return loaded


def _build(path: Path) -> None:
    compiler = nvcc()
    if compiler is None:
        raise BackendError(problem(), "install the CUDA toolkit, or choose cuda.linear in a rule")
    path.parent.mkdir(parents=True, exist_ok=True)
    # another process may build it too: each writes its own file, and the last rename counts
    handle, name = tempfile.mkstemp(suffix=".so", dir=path.parent)
    os.close(handle)
    try:
        done = subprocess.run(command(compiler, Path(name)), capture_output=True, text=True)
        if done.returncode != 0:
            raise BackendError(f"{compiler} cannot build the CUDA kernels:\n{(done.stderr or done.stdout)[-3000:]}")
        os.replace(name, path)
    finally:
        Path(name).unlink(missing_ok=True)
