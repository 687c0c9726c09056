"""Pages of packed weights are mapped before their use: what the process then has, and when nothing is."""

from __future__ import annotations

import ctypes
import errno
import mmap
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

from ktcore.weights.packed import populate
from ktcore.weights.packed.container import PARTS
from ktcore.weights.packed.parts import Part
from ktcore.weights.packed.populate import Populate
from ktcore.weights.packed.reader import PartReader

SIZE = 3 * (1 << 20)

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="asks Linux which pages are mapped")


def mapped(tmp_path: Path) -> mmap.mmap:
    path = tmp_path / "file"
    path.write_bytes(b"x" * SIZE)
    with path.open("rb") as file:
        return mmap.mmap(file.fileno(), SIZE, access=mmap.ACCESS_READ)


def resident(pages: mmap.mmap | np.ndarray) -> int:
    """Bytes of the map that the process has pages of."""
    start = np.frombuffer(pages, np.uint8).ctypes.data
    lines = iter(Path("/proc/self/smaps").read_text().splitlines())
    for line in lines:
        bounds = line.split()[0].split("-")
        if len(bounds) == 2 and int(bounds[0], 16) <= start < int(bounds[1], 16):
            return next(int(found.split()[1]) * 1024 for found in lines if found.startswith("Rss:"))
    raise AssertionError("no such map")


def test_all_pages_are_mapped_whatever_their_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(populate, "CHUNK", 1 << 20)
    ahead, pages = Populate(), mapped(tmp_path)
    assert resident(pages) == 0
    ahead.add(pages)
    ahead.wait()
    assert resident(pages) == SIZE


def test_an_older_kernel_has_pages_touched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(address: int, nbytes: int, advice: int) -> int:
        ctypes.set_errno(errno.EINVAL)
        return -1

    monkeypatch.setattr(populate, "_madvise", unknown)
    ahead, pages = Populate(), mapped(tmp_path)
    ahead.add(pages)
    ahead.wait()
    assert resident(pages) == SIZE


def test_a_page_that_cannot_be_read_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(address: int, nbytes: int, advice: int) -> int:
        ctypes.set_errno(errno.EFAULT)
        return -1

    monkeypatch.setattr(populate, "_madvise", broken)
    ahead, pages = Populate(), mapped(tmp_path)
    ahead.add(pages)
    ahead.wait()
    assert resident(pages) == 0, "touching it would end the process"


def test_what_nobody_holds_any_more_is_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    gate = threading.Event()

    def slowly(part: np.ndarray) -> None:
        assert gate.wait(60)
        seen.append(part.nbytes)

    monkeypatch.setattr(populate, "_populate", slowly)
    ahead, first, gone, last = Populate(), mapped(tmp_path), mapped(tmp_path), mapped(tmp_path)
    for pages in (first, gone, last):
        ahead.add(pages)
    del gone
    pages = last
    gate.set()
    ahead.wait()
    assert seen == [SIZE, SIZE]


@pytest.mark.parametrize(("room", "wanted"), [(SIZE - 1, 0), (SIZE, SIZE)])
def test_a_file_is_mapped_ahead_only_where_all_of_it_has_room(room: int, wanted: int, tmp_path: Path) -> None:
    (tmp_path / PARTS).write_bytes(b"x" * SIZE)
    part = Part("layer 0, up", "acme.tiles/3", "F32[3, 4]", [], pieces=1, nbytes=SIZE)
    entry = {"layout": part.layout, "pieces": 1, "nbytes": SIZE, "kind": part.kind, "losses": [], "offset": 0}
    reader = PartReader(tmp_path, {"parts": {part.key: entry}})
    reader.populate(room)
    found = reader.get(part, lambda piece: pytest.fail("it is there"))
    assert found is not None
    if reader._ahead is not None:
        reader._ahead.wait()
    assert resident(found) == wanted
    reader.close()
