"""A launcher on the OpenCL CPU device, where `run.py` or the user named a SYCL runtime that has one."""

from __future__ import annotations

import os

import pytest
from ktcore_xpu.sycl.home import VARIABLE
from ktcore_xpu.sycl.launcher import Launcher, cpu_launcher


@pytest.fixture(scope="session")
def launcher() -> Launcher:
    if VARIABLE not in os.environ:
        pytest.skip(f"no SYCL runtime: python tests/vendors/sycl/run.py --venv DIR sets one up, or set {VARIABLE}")
    return cpu_launcher()
