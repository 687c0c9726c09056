"""A server's memory: holes between blocks that stay go back to the system, and garbage that comes later is found."""

from __future__ import annotations

import asyncio
import ctypes
import gc
import sys
import threading
import weakref

import psutil
import pytest

pytest.importorskip("fastapi", reason="needs the extra `server`")
pytest.importorskip("httpx", reason="the test's HTTP client")

from fastapi.testclient import TestClient

from ktcore.server.http import memory
from ktcore.server.http.app import build_models_app
from ktcore.server.http.settings import Settings
from ktcore.server.models.registry import Models


def test_holes_between_blocks_go_back_to_the_system() -> None:
    if not sys.platform.startswith("linux") or not hasattr(ctypes.CDLL(None), "malloc_trim"):
        pytest.skip("the C library has no malloc_trim")
    library = ctypes.CDLL(None)
    library.malloc.restype, library.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    library.free.argtypes = [ctypes.c_void_p]
    size = 100_000  # less than what is mapped on its own
    blocks = [library.malloc(size) for _ in range(800)]
    for block in blocks:
        ctypes.memset(block, 1, size)
    for block in blocks[::2]:
        library.free(block)
    resident = psutil.Process().memory_info
    before = resident().rss
    assert memory.trim()
    assert before - resident().rss > 0.5 * size * len(blocks[::2])
    for block in blocks[1::2]:
        library.free(block)


def test_other_systems_and_c_libraries_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ctypes, "CDLL", lambda name: object())
    assert not memory.trim()
    monkeypatch.setattr(ctypes, "CDLL", None)
    monkeypatch.setattr(sys, "platform", "win32")
    assert not memory.trim()


def test_cycles_that_come_after_the_start_are_found() -> None:
    class Node:
        def __init__(self) -> None:
            self.self = self

    held = Node()
    try:
        memory.freeze()
        assert gc.get_freeze_count() > 1000
        later = Node()
        early_ref, later_ref = weakref.ref(held), weakref.ref(later)
        del held, later
        gc.collect()
        assert (early_ref() is None, later_ref() is None) == (False, True)
    finally:
        gc.unfreeze()
        gc.collect()


def test_a_server_gives_memory_back_as_long_as_it_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    called = threading.Event()

    def trim() -> bool:
        called.set()
        return True

    monkeypatch.setattr(memory, "trim", trim)
    with TestClient(build_models_app(Models([]), Settings("none"))):
        assert called.wait(30)


def test_it_ends_with_the_server_and_where_nothing_can_be_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    async def count(answer: bool) -> tuple[int, int]:
        calls = 0

        def trim() -> bool:
            nonlocal calls
            calls += 1
            return answer

        monkeypatch.setattr(memory, "trim", trim)
        async with memory.trimming(0.001):
            for _ in range(1000):
                await asyncio.sleep(0.001)
                if calls > 3:
                    break
        inside = calls
        await asyncio.sleep(0.05)
        return inside, calls - inside

    inside, after = asyncio.run(count(True))
    assert inside > 3
    assert after <= 1  # the thread's last one may have been under way
    assert asyncio.run(count(False))[0] == 1
