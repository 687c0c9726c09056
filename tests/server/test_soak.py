"""A few seconds of the soak test (`python -m tests.server.soak MODEL`) on a tiny model."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

import pytest

pytest.importorskip("uvicorn", reason="needs the extra `server`")
pytest.importorskip("fastapi", reason="needs the extra `server`")
pytest.importorskip("llguidance", reason="needs the extra `server`")
pytest.importorskip("httpx", reason="the test's HTTP client")

import ktcore
from ktcore.engine.prefix.cache import PrefixOptions

from .soak.checks import problems, soak
from .test_clients import listening


def test_mixed_load_leaves_nothing_behind(opened: Callable[..., ktcore.Model], tmp_path: Path) -> None:
    model = opened(context=2048, prefix=PrefixOptions(2**20, tmp_path, 2**21))
    with listening(model) as server:
        load = soak(server.url, "tiny", 2048, 6, 6, lambda: 1, key="right", asks=8, longest=60)
        soaked = asyncio.run(load)
    assert problems(soaked) == []
    assert soaked.tally.choices > 10
    assert len(soaked.tally.kinds) > 8
