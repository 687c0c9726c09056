"""Lowers the shared Triton kernels for Ascend, to Linalg by triton-ascend and to HIVM by AscendNPU-IR, without CANN.

    python tests/triton_kernels/ascend/run.py --venv DIR

Makes DIR when it is missing (800 MB on disk): triton-ascend takes the place of triton, so it needs an environment of
its own. What comes after HIVM is `hivmc`'s, which belongs to CANN. Ends with 0 when every kernel but those of UNABLE is
lowered; the backend itself calls torch_npu's operators and none of these kernels.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import venv
from pathlib import Path

PACKAGES = ("triton-ascend==3.2.0", "ascendnpu-ir==1.2.0", "numpy", "pybind11")
UNABLE = {
    "attention-decode": "triton-ascend has Triton 3.2's language",
    "attention-prefill": "AscendNPU-IR takes no test for NaN on a 64-bit constant",
    "attention-latent": "triton-ascend has Triton 3.2's language",
    "product-e4m3fn-16x32": "Atlas A2 has no 8-bit floats",
    "product-e4m3fnuz-16x32": "Atlas A2 has no 8-bit floats",
}
HERE = Path(__file__).parent


def main() -> int:
    """Prints a line a kernel."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--venv", type=Path, required=True, help="environment with triton-ascend; made when missing")
    folder = parser.parse_args().venv.absolute()
    python = folder / "bin" / "python"
    if not list(folder.glob("lib/python*/site-packages/ascendnpuir")):
        venv.create(folder, with_pip=True)
        subprocess.run([str(python), "-m", "pip", "install", "--quiet", *PACKAGES], check=True)
    done = subprocess.run([str(python), str(HERE / "lower.py")], stdout=subprocess.PIPE, text=True, check=True)
    lines = dict(line.split(": ", 1) for line in done.stdout.splitlines() if ": " in line)
    failed = 0
    for name, found in lines.items():
        lowered = found.startswith("HIVM")
        reason = "" if lowered else UNABLE.get(name)
        failed += not lowered and reason is None
        print(f"{name}: {found}" if reason in ("", None) else f"{name}: not lowered, {reason}")
    print(f"{sum(f.startswith('HIVM') for f in lines.values())} of {len(lines)} lowered, {failed} failed")
    return int(bool(failed) or not lines)


if __name__ == "__main__":
    sys.exit(main())
