"""Loading streams: of a layer as wide as DeepSeek-V3's, no more than a part is in memory twice."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "load_memory.py"
EXPERTS, FORMAT = 32, "Q2_K"
SPARE = 350 << 20  # over the libraries and the packed weights; twice the experts would be 460 MiB
LINUX = sys.platform.startswith("linux")


@pytest.mark.skipif(not LINUX, reason="reads /proc/self/status")
def test_the_peak_stays_near_the_packed_size(tmp_path: Path) -> None:
    spec = importlib.util.spec_from_file_location("load_memory", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    path = script.write(tmp_path / "layer.gguf", EXPERTS, FORMAT)
    found = script.measure(path)
    assert found["finite"]
    assert found["peak"] - found["before"] <= path.stat().st_size + SPARE
