"""Builds and loads the library of the quantised product: when first needed, kept by a hash of what it is made of."""

from __future__ import annotations

import ctypes
import hashlib
import os
import subprocess
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

from ktcore.errors import BackendError
from ktcore_triton.native.fragments import Fragments

SOURCE = Path(__file__).parent / "csrc"
KERNEL = SOURCE / "w4a16.cu"


class Gemm(ctypes.Structure):
    """One product, field by field as `KtcoreGemm` of the kernel's source."""

    POINTERS = ("x", "codes", "scale", "offset", "bias", "out", "partial", "arrived")
    INTEGERS = ("m", "n", "k", "group", "zero", "bits", "bf16", "half_scale", "splits")
    _fields_ = [(name, ctypes.c_void_p) for name in POINTERS] + [(name, ctypes.c_int) for name in INTEGERS]


class Build(ABC):
    """One compiler's library.

    Attributes:
        backend: whose it is; also the folder of the cache, and what to choose instead, "<backend>.linear".
        title: what it holds, in words ("CUDA kernels").
        chips: that it is for, in words.
        compiler_name, compiler_variable: of the compiler, and of the variable that names another.
        cache_variable: names the folder of built libraries.
        fragments: of the chips that it is for; None where no chip's are known.
        environment: what the compiler needs to be told besides.
    """

    backend: str
    title: str
    chips: str
    compiler_name: str
    compiler_variable: str
    cache_variable: str
    fragments: Fragments | None
    environment: Mapping[str, str] = MappingProxyType({})
    _loaded: ctypes.CDLL | None = None

    @abstractmethod
    def compiler(self) -> str | None:
        """Path of the compiler, where there is one."""

    @abstractmethod
    def flags(self) -> list[str]:
        """Of the compiler; without source and target."""

    def commands(self, compiler: str, target: Path) -> list[list[str]]:
        """How the library is built, one command after the other; anything else that they write lies beside it."""
        return [[compiler, *self.flags(), str(KERNEL), "-o", str(target)]]

    def load(self, path: Path) -> ctypes.CDLL:
        """The built library."""
        return ctypes.CDLL(str(path))

    def path(self) -> Path:
        """Where the library is, or will be: a folder of the user's, or the variable's."""
        home = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "ktcore" / self.backend
        folder = Path(os.environ.get(self.cache_variable, home))
        digest = hashlib.sha256(repr(self.flags()).encode())
        for path in sorted(SOURCE.iterdir()):
            digest.update(path.name.encode() + path.read_bytes())
        return folder / f"libktcore_{self.backend}-{digest.hexdigest()[:16]}.so"

    def problem(self) -> str:
        """Why the library cannot be had here; empty when it is built, or can be."""
        if self.fragments is None:
            return f"no matrix instructions of {self.chips} are known"
        if self.path().is_file() or self.compiler() is not None:
            return ""
        return (
            f"its {self.title} are not built and there is no {self.compiler_name} to build them "
            f"(on the path, or as {self.compiler_variable})"
        )

    def status(self) -> str:
        """The same in a few words, for `ktcore doctor`."""
        if self.fragments is not None and self.path().is_file():
            return f"{self.title} built"
        return self.problem() or f"{self.title} are built by {self.compiler_name} when first used"

    def library(self) -> ctypes.CDLL:
        """The library, built now if it is not yet.

        Raises:
            BackendError: there is no compiler, or it fails, with its own words.
        """
        if self._loaded is None:
            path = self.path()
            if not path.is_file():
                self._build(path)
            self._loaded = typed(self.load(path))
        return self._loaded

    def _build(self, path: Path) -> None:
        compiler = self.compiler()
        if compiler is None:
            raise BackendError(self.problem(), f"install it, or choose {self.backend}.linear in a rule")
        path.parent.mkdir(parents=True, exist_ok=True)
        # another process may build it too: each works in a folder of its own, and the last rename counts
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            made = Path(folder) / path.name
            for command in self.commands(compiler, made):
                self._run(command)
            os.replace(made, path)

    def _run(self, command: list[str]) -> None:
        try:
            done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **self.environment})
            words = done.stderr or done.stdout if done.returncode else ""
        except OSError as error:
            words = str(error)
        if words:
            raise BackendError(
                f"{command[0]} cannot build the {self.title}:\n{words[-3000:]}",
                f"mend it, or choose {self.backend}.linear in a rule",
            )


def typed(loaded: ctypes.CDLL) -> ctypes.CDLL:
    """The library with the types of its functions."""
    loaded.ktcore_gemm.argtypes = [ctypes.POINTER(Gemm), ctypes.c_void_p]
    loaded.ktcore_gemm.restype = ctypes.c_int
    loaded.ktcore_error.argtypes = [ctypes.c_int]
    loaded.ktcore_error.restype = ctypes.c_char_p
    return loaded
