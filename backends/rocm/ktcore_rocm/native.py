"""The quantised product's library for AMD: built by hipcc for the chip at hand."""

from __future__ import annotations

import ctypes
import os
import shutil
from pathlib import Path
from types import MappingProxyType

from ktcore_triton.native.build import KERNEL, Build
from ktcore_triton.native.fragments import FRAGMENTS, Fragments

from ktcore_rocm.runtime import hip_runtime

MFMA = ("gfx90a", "gfx942", "gfx950")


def fragments_of(arch: str) -> Fragments | None:
    """The matrix instructions of a chip; None for one without, or one that is not known.

    gfx908 has them for float16 alone, gfx10 none. MFMA on CDNA2 to 4, WMMA on RDNA3 and 4: AMD's ISA documents.
    """
    if arch in MFMA:
        return FRAGMENTS["mfma"]
    for family, name in (("gfx11", "wmma11"), ("gfx12", "wmma12")):
        if arch.startswith(family) and len(arch) == 7 and arch != "gfx1250":
            return FRAGMENTS[name]
    return None


class HipBuild(Build):
    """Device code of one chip, "gfx942"."""

    backend = "rocm"
    title = "HIP kernels"
    compiler_name = "hipcc"
    compiler_variable = "KTCORE_HIPCC"
    cache_variable = "KTCORE_ROCM_CACHE"
    environment = MappingProxyType({"HIP_PLATFORM": "amd"})  # else hipcc calls nvcc where there is one

    def __init__(self, arch: str) -> None:
        self.arch = arch
        self.chips = arch or "a chip without a name"
        self.fragments = fragments_of(arch)

    def compiler(self) -> str | None:
        """KTCORE_HIPCC, or the one on the path, or that of $ROCM_PATH (/opt/rocm)."""
        found = os.environ.get(self.compiler_variable) or shutil.which("hipcc")
        usual = Path(os.environ.get("ROCM_PATH", "/opt/rocm")) / "bin" / "hipcc"
        return found or (str(usual) if usual.is_file() else None)

    def commands(self, compiler: str, target: Path) -> list[list[str]]:
        """Compiled by hipcc, linked without it: hipcc would tie the library to its own copy of the HIP runtime, which
        does not know the streams of the copy that torch brings."""
        made = target.with_suffix(".o")
        linker = os.environ.get("CXX", "c++")
        return [
            [compiler, *self.flags(), "-c", str(KERNEL), "-o", str(made)],
            [linker, "-shared", str(made), "-o", str(target)],
        ]

    def load(self, path: Path) -> ctypes.CDLL:
        """With the HIP runtime that the process has loaded, whose functions the library then finds."""
        hip_runtime(ctypes.RTLD_GLOBAL)
        return super().load(path)

    def flags(self) -> list[str]:
        # both passes must agree on sizes, and the host's sees no architecture: the build names the fragments
        macro = [] if self.fragments is None else [self.fragments.macro]
        return ["-x", "hip", f"--offload-arch={self.arch}", *macro, "-O3", "-std=c++17", "-fPIC"]
