"""Instruction sets: which are offered, and how one is forced."""

from __future__ import annotations

import pytest
from ktcore_cpu import _native

UNITS = ["scalar", "avx2", "avx_vnni", "avx512", "avx512_vnni", "avx512_bf16", "amx"]
NEEDS = {
    "avx2": "avx2",
    "avx_vnni": "avx_vnni",
    "avx512": "avx512bw",
    "avx512_vnni": "avx512_vnni",
    "avx512_bf16": "avx512_bf16",
    "amx": "amx_granted_by_the_system",
}


def test_offered_sets_are_those_whose_flags_the_cpu_has() -> None:
    here, flags = _native.isa_supported(), _native.cpu_flags()
    assert here == [u for u in UNITS if u == "scalar" or NEEDS[u] in flags]


@pytest.mark.parametrize("isa", _native.isa_supported())
def test_each_offered_set_can_be_forced(monkeypatch: pytest.MonkeyPatch, isa: str) -> None:
    monkeypatch.setenv("KTCORE_ISA", isa)
    assert _native.isa_selected() == isa


def test_the_highest_is_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    for value in (None, ""):
        monkeypatch.delenv("KTCORE_ISA", raising=False)
        if value is not None:
            monkeypatch.setenv("KTCORE_ISA", value)
        assert _native.isa_selected() == _native.isa_supported()[-1]


def test_an_unknown_set_is_refused_with_what_there_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KTCORE_ISA", "sse9")
    with pytest.raises(ValueError, match=r"sse9 is not known \(known: scalar, avx2, .*for this CPU, it has: scalar"):
        _native.Pool(1)


@pytest.mark.parametrize("isa", [u for u in UNITS if u not in _native.isa_supported()])
def test_a_set_the_cpu_lacks_is_refused_with_what_it_has(monkeypatch: pytest.MonkeyPatch, isa: str) -> None:
    monkeypatch.setenv("KTCORE_ISA", isa)
    with pytest.raises(ValueError, match=rf"{isa} is not supported .*lacks \S+.*it has: scalar"):
        _native.Pool(1)


def test_emulated_units_run_by_name_only(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in _native.isa_emulated():
        assert name not in _native.isa_supported()
        monkeypatch.setenv("KTCORE_ISA", name)
        assert _native.isa_selected() == name
