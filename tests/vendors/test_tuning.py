"""The backends' launch shapes compile for their chips without spilling, and spread small products over them.

KTCORE_VENDORS_FULL=1 compiles every shape for every chip; without it the one that needed a shape of its own.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="kernels are compiled by Triton")
pytest.importorskip("ktcore_rocm")

from ktcore_cuda.devices import DECLARED as CUDA
from ktcore_cuda.tuning import tuning as cuda
from ktcore_rocm.devices import DECLARED as ROCM
from ktcore_rocm.tuning import tuning as rocm
from ktcore_triton.tuning import Product
from ktcore_xpu.devices import DECLARED as XPU
from ktcore_xpu.tuning import tuning as xpu

from tests.triton_kernels.targets import TARGETS, Target

FULL = os.environ.get("KTCORE_VENDORS_FULL") == "1"
SPILL = 32
"""Bytes of stack a thread."""
CASES = (
    [(t, []) for t in TARGETS]
    if FULL
    else [(t, ["attention-latent", "attention-chosen-latent"]) for t in TARGETS if t.name == "gfx1100"]
)


@pytest.mark.parametrize(("target", "names"), CASES, ids=lambda v: v.name if isinstance(v, Target) else "")
def test_shapes_compile_within_the_chips_limits(target: Target, names: list[str]) -> None:
    command = [sys.executable, "-W", "ignore", str(Path(__file__).parent / "compile_tuned.py"), target.name, *names]
    done = subprocess.run(
        command, env={**os.environ, "TRITON_INTERPRET": "0"}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(found) == (len(names) or 10)
    assert [f for f in found if f["shared"] > target.shared or f["spilled"] > SPILL] == []


@pytest.mark.parametrize(("tuning", "declared"), [(cuda, CUDA), (rocm, ROCM), (xpu, XPU)])
def test_small_products_are_spread_over_the_processors_and_large_ones_are_not(tuning, declared) -> None:  # type: ignore[no-untyped-def]
    for device in declared:
        linear = tuning(device).linear
        assert linear(Product(1, 1024, 8192)).splits > 1
        assert linear(Product(1, 152_064, 4096)).splits == 1
        assert linear(Product(1, 1024, 512)).splits == 1


def test_wavefronts_of_64_are_half_as_many() -> None:
    shapes = {str(c.properties["arch"]): rocm(c).linear(Product(1, 4096, 4096)).launch.warps for c in ROCM}
    assert shapes == {"gfx90a": 2, "gfx942": 2, "gfx950": 2, "gfx1100": 4, "gfx1201": 4}
