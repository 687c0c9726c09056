"""Memory figures and the words about them."""

from __future__ import annotations

import pytest

from ktcore.ops import ExpertsSpec, LinearSpec, RMSNormSpec
from ktcore.placement.memory import DeviceMemory, fit_hint, human_bytes, human_count, parse_bytes, workspace_bytes

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


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("1", 1),
        ("1000", 1000),
        ("3K", 3000),
        ("3KiB", 3 * 1024),
        ("2M", 2_000_000),
        ("2MiB", 2 << 20),
        ("2GB", 2_000_000_000),
        (" 1.5 GiB ", 3 << 29),
        ("1TB", 10**12),
        ("1tib", 1 << 40),
    ],
)
def test_sizes_are_read_in_powers_of_1000_or_with_an_i_of_1024(text: str, size: int) -> None:
    assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["", "GB", "2iB", "-1", "1 2", "12 QB", "0", "0GiB"])
def test_what_is_no_size_is_an_error(text: str) -> None:
    with pytest.raises(ValueError, match=r"size"):
        parse_bytes(text)


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (999_999, "999999"),
        (1_000_000, "1 M"),
        (134_515_008, "135 M"),
        (999_000_000, "999 M"),
        (1_000_000_000, "1.0 B"),
        (671_026_419_200, "671.0 B"),
    ],
)
def test_counts_of_parameters_are_short(count: int, text: str) -> None:
    assert human_count(count) == text


def test_the_hint_begins_with_256_tokens_and_needs_a_cache() -> None:
    def hint(limit: int, kv: int = 1024) -> str:
        return fit_hint(DeviceMemory(weights=100, kv=kv, workspace=0, limit=limit), 1024)

    assert "a context of 256 tokens fits" in hint(100 + 256)
    assert "a context of" not in hint(100 + 255)
    assert "a context of" not in hint(100)
    assert "a context of" not in hint(5000, kv=0)
