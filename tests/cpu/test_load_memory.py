"""Loading streams: of a layer as wide as DeepSeek-V3's or V4-Flash's, no more than a part is in memory twice."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
EXPERTS, FORMAT = 32, "Q2_K"
SPARE = 350 << 20  # over the libraries and the packed weights; twice the experts would be 460 MiB
LINUX = sys.platform.startswith("linux")


@pytest.mark.skipif(not LINUX, reason="reads /proc/self/status")
@pytest.mark.parametrize(("script", "rest"), [("load_memory", (FORMAT,)), ("v4_layer", ())])
def test_the_peak_stays_near_the_packed_size(
    script: str, rest: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(BENCHMARKS)
    path = importlib.import_module(script).write(tmp_path / "layer.gguf", EXPERTS, *rest)
    found = importlib.import_module("load_memory").measure(path)
    assert found["finite"]
    assert found["peak"] - found["before"] <= path.stat().st_size + SPARE
