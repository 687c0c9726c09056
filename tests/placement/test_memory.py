"""Memory figures and the words about them."""

from __future__ import annotations

import pytest

from ktcore.ops import ExpertsSpec, LinearSpec, RMSNormSpec
from ktcore.placement.memory import DeviceMemory, fit_hint, human_bytes, workspace_bytes

GIB = 1 << 30


def test_total_and_excess() -> None:
    memory = DeviceMemory(weights=5, kv=3, workspace=1, limit=7)
    assert (memory.total, memory.excess) == (9, 2)
    assert DeviceMemory(5, 3, 1).excess == 0
    assert DeviceMemory(5, 3, 1, 9).excess == 0


def test_workspace_counts_four_bytes_a_value() -> None:
    assert workspace_bytes(LinearSpec(10, 30, "F32"), tokens=2) == 2 * 4 * 40
    assert workspace_bytes(ExpertsSpec(10, 20, 8, 3, "silu", "F32", "F32", "F32"), tokens=1) == 4 * 3 * (10 + 60)
    assert workspace_bytes(RMSNormSpec(16, 1e-5), tokens=1) == 4 * 32


def test_the_hint_gives_the_longest_context_that_fits() -> None:
    memory = DeviceMemory(weights=10 * GIB, kv=8 * GIB, workspace=GIB, limit=15 * GIB)
    assert fit_hint(memory, 8192) == "a context of 4096 tokens fits; or put nodes on the host with a rule"
    assert "device: host" in fit_hint(DeviceMemory(20 * GIB, GIB, 0, 15 * GIB), 8192)


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (GIB, "1.0 GiB"), (1 << 41, "2.0 TiB")]
)
def test_human_bytes(count: int, text: str) -> None:
    assert human_bytes(count) == text
