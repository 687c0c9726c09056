"""The quantised product's library for NVIDIA: built by nvcc for every chip at once."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from ktcore_triton.native.build import Build
from ktcore_triton.native.fragments import FRAGMENTS

ARCHITECTURES = (80, 86, 89, 90, 120)


class CudaBuild(Build):
    """Device code of `architectures`, and what later ones can translate."""

    backend = "cuda"
    title = "CUDA kernels"
    chips = "sm_80 and later"
    compiler_name = "nvcc"
    compiler_variable = "KTCORE_NVCC"
    cache_variable = "KTCORE_CUDA_CACHE"
    fragments = FRAGMENTS["nv"]

    def __init__(self, architectures: tuple[int, ...] = ARCHITECTURES) -> None:
        self._architectures = architectures

    def compiler(self) -> str | None:
        """KTCORE_NVCC, or the one on the path, or that of /usr/local/cuda."""
        found = os.environ.get(self.compiler_variable) or shutil.which("nvcc")
        usual = Path("/usr/local/cuda/bin/nvcc")
        return found or (str(usual) if usual.is_file() else None)

    def flags(self) -> list[str]:
        codes = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in self._architectures]
        codes.append(f"-gencode=arch=compute_{self._architectures[-1]},code=compute_{self._architectures[-1]}")
        usual = ["-O3", "-std=c++17", "--shared", "-Xcompiler", "-fPIC", "-cudart", "static", "--threads", "2"]
        return [*usual, *codes]
