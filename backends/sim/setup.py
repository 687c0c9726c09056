"""Builds the native half: a torch device on the PrivateUse1 key."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from setuptools import setup
from torch.utils.cpp_extension import BuildExtension, CppExtension

os.environ.setdefault("MAX_JOBS", "2")
UNITS = ("unit_torch", "unit_python", "unit_host")
"""Each includes some of the other files: torch's headers cost more than all of the code."""

setup(
    ext_modules=[
        CppExtension(
            "ktcore_sim._C",
            [f"csrc/{name}.cpp" for name in UNITS],
            include_dirs=[str(Path(__file__).parent / "csrc")],
            # -O1: the kernels are torch's own, and the build has to be quick
            extra_compile_args=["-O1", "-g0", "-Wall", "-Wextra", "-Wno-unused-parameter"],
        )
    ],
    cmdclass={"build_ext": BuildExtension.with_options(use_ninja=shutil.which("ninja") is not None)},
)
