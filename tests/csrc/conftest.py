"""Pools for every instruction set of this machine."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from ktcore_cpu import _native


@pytest.fixture(params=_native.isa_supported() + _native.isa_emulated())
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Forces one instruction set on the pools made in the test."""
    monkeypatch.setenv("KTCORE_ISA", request.param)
    return str(request.param)


@pytest.fixture
def pool(isa: str) -> _native.Pool:
    """Two threads of the forced instruction set."""
    return _native.Pool(2)


@pytest.fixture
def pool_of(monkeypatch: pytest.MonkeyPatch) -> Callable[[str, int], _native.Pool]:
    """A pool of a named instruction set."""

    def make(isa: str, threads: int = 2) -> _native.Pool:
        monkeypatch.setenv("KTCORE_ISA", isa)
        return _native.Pool(threads)

    return make
