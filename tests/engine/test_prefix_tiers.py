"""What the prefix cache is made of: names of pages, tiers in main memory and on disk, and bytes that come and go."""

from __future__ import annotations

import hashlib
import os
import struct
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from ktcore.engine.prefix.digests import extend_digests, state_digest
from ktcore.engine.prefix.disk import MAGIC, DiskTier
from ktcore.engine.prefix.memory import MemoryTier
from ktcore.engine.prefix.transfer import Transfer
from ktcore.errors import RequestError

from .toy import Pages, States, toy

HEAD = 52  # bytes before a content on disk: magic, version, size, name, checksum


def content(value: int, size: int = 100) -> torch.Tensor:
    return torch.full((size,), value, dtype=torch.uint8)


def name(value: int) -> bytes:
    return bytes([value]) * 16


def test_a_page_is_named_by_all_tokens_up_to_its_end() -> None:
    digests: list[bytes] = []
    extend_digests(digests, [1, 2, 3, 4, 5], 2)
    first = hashlib.blake2b(struct.pack("<2q", 1, 2), digest_size=16).digest()
    assert digests == [first, hashlib.blake2b(first + struct.pack("<2q", 3, 4), digest_size=16).digest()]
    kept = list(digests)
    extend_digests(digests, [1, 2, 3, 4, 5, 6, 7], 2)
    assert digests[:2] == kept
    assert len(digests) == 3
    other: list[bytes] = []
    extend_digests(other, [9, 2, 3, 4], 2)
    assert not set(other) & set(digests), "another beginning names all that follows otherwise"
    assert state_digest(first) != first


def test_memory_drops_what_was_used_longest_ago() -> None:
    tier = MemoryTier(250)
    for i in range(2):
        tier.put(name(i), content(i))
    assert tier.get(name(0)) is not None
    tier.put(name(2), content(2))
    assert [name(i) in tier for i in range(3)] == [True, False, True]
    assert (tier.bytes, len(tier)) == (200, 2)
    tier.put(name(3), content(3, 251))
    assert name(3) not in tier, "it does not fit at all, and nothing goes for it"
    tier.put(name(0), content(9))
    assert torch.equal(tier.get(name(0)), content(0))  # type: ignore[arg-type]
    tier.clear()
    assert (tier.bytes, len(tier), tier.get(name(0))) == (0, 0, None)
    for i in range(4, 7):
        tier.put(name(i), content(i))
    assert (tier.bytes, len(tier)) == (200, 2)
    nothing = MemoryTier(0)
    nothing.put(name(1), content(1))
    assert len(nothing) == 0


def test_disk_gives_back_what_was_put_also_after_a_restart(tmp_path: Path) -> None:
    for round_ in range(2):
        tier = DiskTier(tmp_path / "cache", "aa", 10_000)
        for i in range(3):
            assert (name(i) in tier) == bool(round_)
            tier.put(name(i), content(i))
        tier.close()
        assert tier.used == 3 * (100 + HEAD)
        found = [tier.get(name(i)) for i in range(3)]
        assert all(torch.equal(f, content(i)) for i, f in enumerate(found) if f is not None)
        assert None not in found
        assert tier.get(name(9)) is None
        assert tier.dropped == 0
    files = sorted(p.relative_to(tmp_path / "cache") for p in (tmp_path / "cache").rglob("*.kv"))
    assert files == [Path("aa") / f"{i:02x}" / f"{name(i).hex()}.kv" for i in range(3)]


def test_a_content_is_written_once(tmp_path: Path) -> None:
    tier = DiskTier(tmp_path, "aa", 10_000)
    tier.put(name(1), content(1))
    tier.put(name(1), content(2))  # may come before the first is written
    tier.close()
    assert tier.used == 100 + HEAD
    found = tier.get(name(1))
    assert found is not None
    assert torch.equal(found, content(1))


def test_names_that_begin_alike_are_kept_apart(tmp_path: Path) -> None:
    tier = DiskTier(tmp_path, "aa", 10_000)
    names = [b"\x01" * 15 + bytes([i]) for i in range(3)]
    for i, one in enumerate(names):
        tier.put(one, content(i))
    tier.close()
    assert tier.dropped == 0
    assert [int(found[0]) for one in names if (found := tier.get(one)) is not None] == [0, 1, 2]


@pytest.mark.parametrize("damage", ["bit", "cut", "longer", "head", "version", "another's", "empty"])
def test_a_damaged_file_is_none_and_goes(damage: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tier = DiskTier(tmp_path, "aa", 10_000)
    tier.put(name(1), content(1))
    tier.put(name(2), content(2))
    tier.close()
    (path,) = tmp_path.rglob(f"{name(1).hex()}.kv")
    raw = path.read_bytes()
    assert raw[:12] == MAGIC + b"\x01\0\0\0"
    (other,) = tmp_path.rglob(f"{name(2).hex()}.kv")
    changed = {
        "bit": raw[:-1] + b"\x00",
        "cut": raw[:-1],
        "longer": raw + b"\x01",
        "head": raw[:20],
        "version": raw[:8] + b"\x02" + raw[9:],
        "another's": other.read_bytes(),
        "empty": b"",
    }
    path.write_bytes(changed[damage])
    assert tier.get(name(1)) is None
    assert not path.exists()
    assert name(1) not in tier
    assert tier.used == 100 + HEAD
    assert "is damaged and goes" in caplog.text


def test_a_file_that_another_process_removed_is_forgotten(tmp_path: Path) -> None:
    tier = DiskTier(tmp_path, "aa", 10_000)
    tier.put(name(1), content(1))
    tier.close()
    next(tmp_path.rglob("*.kv")).unlink()
    assert tier.get(name(1)) is None
    assert name(1) not in tier
    assert tier.used == 0


def test_the_bound_is_for_all_files_and_the_longest_unused_go_first(tmp_path: Path) -> None:
    old = DiskTier(tmp_path, "aa", 10_000)
    for i in range(3):
        old.put(name(i), content(i))
    old.close()
    for i in range(3):  # read in another order than written
        os.utime(next(tmp_path.rglob(f"{name(i).hex()}.kv")), ns=(i, [30, 10, 20][i]))
    tier = DiskTier(tmp_path, "bb", 3 * (100 + HEAD))
    tier.put(name(7), content(7))
    tier.close()
    left = {p.stem[:2] for p in tmp_path.rglob("*.kv")}
    assert left == {"00", "02", "07"}
    assert tier.used == 3 * (100 + HEAD)
    smaller = DiskTier(tmp_path, "bb", 2 * (100 + HEAD))
    smaller.close()
    assert {p.stem[:2] for p in tmp_path.rglob("*.kv")} == {"00", "07"}


def test_what_was_read_last_stays(tmp_path: Path) -> None:
    tier = DiskTier(tmp_path, "aa", 2 * (100 + HEAD))
    tier.put(name(1), content(1))
    tier.put(name(2), content(2))
    tier.close()
    again = DiskTier(tmp_path, "aa", 2 * (100 + HEAD))
    assert again.get(name(1)) is not None
    again.put(name(3), content(3))
    again.close()
    assert [name(i) in again for i in (1, 2, 3)] == [True, False, True]


def test_a_content_beyond_the_bound_is_not_written(tmp_path: Path) -> None:
    tier = DiskTier(tmp_path, "aa", 100 + HEAD - 1)
    tier.put(name(1), content(1))
    tier.put(name(2), content(2, 99))
    tier.close()
    assert [name(i) in tier for i in (1, 2)] == [False, True]


def test_what_a_killed_process_left_half_written_is_removed(tmp_path: Path) -> None:
    (tmp_path / "aa/01").mkdir(parents=True)
    (tmp_path / "aa/01/x.kv.77.partial").write_bytes(b"half")
    DiskTier(tmp_path, "bb", 1000).close()
    assert not list(tmp_path.rglob("*.partial"))


def test_a_write_that_fails_is_counted_said_and_leaves_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tier = DiskTier(tmp_path, "aa", 10_000)
    tier._path(name(1)).mkdir(parents=True)  # no file can take its name
    tier.put(name(1), content(1))
    tier.put(name(2), content(2))
    tier.close()
    assert (tier.dropped, tier.used) == (1, 100 + HEAD)
    assert "cannot be written" in caplog.text
    assert not list(tmp_path.rglob("*.partial"))


def test_a_place_that_is_no_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RequestError, match="cannot be used"):
        DiskTier(tmp_path / "file", "aa", 1000)


class Device(Pages):
    """Two tensors of other types and widths, as layers of one model may have."""

    def page_tensors(self) -> list[torch.Tensor]:
        return self.tensors

    def allocate_pages(self, pages: int, page_size: int) -> None:
        count = pages * page_size
        self.tensors = [
            torch.arange(count).float().reshape(pages, page_size),
            torch.arange(pages * 6).to(torch.int16).reshape(pages, 3, 2),
        ]


def test_bytes_of_pages_and_states_come_back_where_they_are_put() -> None:
    part = Device()
    part.allocate_pages(4, 2)
    other = Device()
    other.allocate_pages(4, 2)
    states = States()
    states.allocate_states(3)
    states.memory[1] = 5
    model = toy(part)
    transfer = Transfer(SimpleNamespace(caches=(part, other), states=(states,)))  # type: ignore[arg-type]
    assert (transfer.page_bytes, transfer.state_bytes, transfer.obstacle) == (2 * (2 * 4 + 6 * 2), 8, "")
    before = [t.clone() for t in (*part.tensors, *other.tensors)]
    first, second = transfer.read_pages([2, 1])
    one = b"".join(t[2].numpy().tobytes() for t in before)
    assert first.numpy().tobytes() == one
    transfer.write_pages([0, 3], [first, second])
    for old, new in zip(before, (*part.tensors, *other.tensors), strict=True):
        assert torch.equal(new, old[[2, 1, 2, 1]])
    transfer.write_state(2, transfer.read_state(1))
    assert states.memory[:, 0].tolist() == [-1000, 5, 5]
    assert Transfer(model).layout() == [["torch.float32", [2]], ["torch.int16", [3, 2]]]


def test_a_cache_that_shows_no_memory_is_an_obstacle() -> None:
    class Closed:
        pass

    model: Any = SimpleNamespace(caches=(Closed(), Device()), states=())
    transfer = Transfer(model)
    assert transfer.obstacle == "Closed does not show its memory"
    assert (transfer.page_bytes, transfer.layout()) == (0, [])
