"""Runs the SYCL kernels' tests on Intel's OpenCL CPU device, with a SYCL runtime of pip's in an environment of its own.

    python tests/vendors/sycl/run.py --venv DIR [pytest arguments]

Makes DIR when it is missing (a download of about 500 MB, 1.8 GB on disk). Run it by ktcore's own Python: torch and the
backends come from there, headers and libraries of SYCL from DIR.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import venv
from pathlib import Path

PACKAGES = ("intel-sycl-rt==2026.2.0", "intel-opencl-rt==2026.2.0")
HERE = Path(__file__).parent


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--venv", type=Path, required=True, help="environment with the SYCL runtime; made when missing")
    options, rest = parser.parse_known_args()
    folder = options.venv.absolute()
    if not (folder / "lib" / "libintelocl.so").exists() or not (folder / "include" / "sycl" / "sycl.hpp").exists():
        venv.create(folder, with_pip=True)
        subprocess.run([str(folder / "bin" / "python"), "-m", "pip", "install", "--quiet", *PACKAGES], check=True)
    environment = os.environ | {"KTCORE_SYCL_HOME": str(folder)}
    command = [sys.executable, "-m", "pytest", "--timeout", "600", str(HERE), *rest]
    return subprocess.run(command, env=environment, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
