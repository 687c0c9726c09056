"""The packed-weight cache: same numbers, packed once, never used when it is stale or damaged."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

import ktcore
from ktcore.engine.step.runner import LoadedModel
from ktcore.errors import CheckpointError
from ktcore.weights.packed.container import MANIFEST, PARTS
from ktcore.weights.packed.parts import Fill, Part
from ktcore.weights.packed.writer import PartWriter

from .tiny_sources import llama_gguf, tiny_moe

IDS = list(range(3, 40))


def logits(path: Path, cache: Path | None) -> torch.Tensor:
    with ktcore.load(path, backend="cpu", packed_cache=cache) as model:
        return model.logits(IDS)


@pytest.fixture
def packs(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What was packed into the cache since."""
    seen: list[str] = []
    plain = PartWriter.get

    def counting(self: PartWriter, part: Part, fill: Fill) -> object:
        def counted(piece: int) -> object:
            seen.append(part.what)
            return fill(piece)

        return plain(self, part, counted)  # type: ignore[arg-type]

    monkeypatch.setattr(PartWriter, "get", counting)
    return seen


@pytest.fixture(params=["folder", "gguf"])
def source(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return tiny_moe(tmp_path / "model") if request.param == "folder" else llama_gguf(tmp_path / "model.gguf")


def entry(cache: Path) -> Path:
    (found,) = (p for p in cache.iterdir() if p.is_dir())
    return found


def test_packed_once_and_mapped_ever_after(source: Path, tmp_path: Path, packs: list[str]) -> None:
    expected = logits(source, None)
    assert packs == []
    torch.testing.assert_close(logits(source, tmp_path / "cache"), expected, rtol=0, atol=0)
    assert packs
    packs.clear()
    torch.testing.assert_close(logits(source, tmp_path / "cache"), expected, rtol=0, atol=0)
    assert packs == []


@pytest.mark.parametrize("damage", ["bit", "cut", "manifest", "no manifest", "layout"])
def test_a_damaged_entry_is_made_again_and_says_so(
    damage: str, tmp_path: Path, packs: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    source, cache = tiny_moe(tmp_path / "model"), tmp_path / "cache"
    expected = logits(source, cache)
    packs.clear()
    parts, manifest = entry(cache) / PARTS, entry(cache) / MANIFEST
    if damage == "bit":
        with parts.open("r+b") as file:
            file.write(bytes([parts.read_bytes()[0] ^ 1]))
    elif damage == "cut":
        os.truncate(parts, 100)
    elif damage == "manifest":
        manifest.write_text(manifest.read_text().replace("BF16", "F16_"))
    elif damage == "no manifest":
        manifest.unlink()
    else:
        manifest.write_text(manifest.read_text().replace('"version": 1', '"version": 0'))
    torch.testing.assert_close(logits(source, cache), expected, rtol=0, atol=0)
    assert packs
    assert "made again" in caplog.text
    packs.clear()
    caplog.clear()
    logits(source, cache)
    assert packs == []
    assert not caplog.text


def test_a_changed_source_makes_the_entry_stale(
    tmp_path: Path, packs: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    cache = tmp_path / "cache"
    logits(tiny_moe(tmp_path / "model"), cache)
    packs.clear()
    shutil.rmtree(tmp_path / "model")
    changed = tiny_moe(tmp_path / "model", seed=1)
    torch.testing.assert_close(logits(changed, cache), logits(changed, None), rtol=0, atol=0)
    assert packs
    assert "stale" in caplog.text


def test_a_copied_entry_is_checked_and_used(tmp_path: Path, packs: list[str]) -> None:
    source = tiny_moe(tmp_path / "model")
    logits(source, tmp_path / "cache")
    packs.clear()
    shutil.copytree(tmp_path / "cache", tmp_path / "copy", copy_function=shutil.copyfile)
    logits(source, tmp_path / "copy")
    assert packs == []


def test_other_rules_have_an_entry_of_their_own(tmp_path: Path) -> None:
    source, cache = tiny_moe(tmp_path / "model"), tmp_path / "cache"
    rules = tmp_path / "r.yaml"
    rules.write_text(
        "version: 1\nrules:\n  - {name: q, match: {op: moe}, use: [cpu.moe], options: {quantize: int8_g64}}\n"
    )
    logits(source, cache)
    with ktcore.load(source, backend="cpu", rules=rules, packed_cache=cache) as model:
        assert model.quantization_error["experts"] > 0
    assert sum(p.is_dir() for p in cache.iterdir()) == 2


LOAD = """
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
import ktcore
with ktcore.load(Path(sys.argv[1]), backend="cpu", threads=1, packed_cache=sys.argv[2]) as model:
    print(model.logits(range(3, 40))[-1].tolist())
"""


def test_processes_that_begin_at_once_agree(tmp_path: Path) -> None:
    source, cache = tiny_moe(tmp_path / "model"), tmp_path / "cache"
    command = [sys.executable, "-c", LOAD, str(source), str(cache)]
    workers = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    answers = [worker.communicate()[0] for worker in workers]
    assert answers == [f"{logits(source, None)[-1].tolist()}\n"] * 3
    assert len([p for p in cache.iterdir() if p.is_dir()]) == 1


def test_a_cache_that_cannot_be_written_is_a_clean_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="cannot be written"):
        logits(tiny_moe(tmp_path / "model"), tmp_path / "file" / "cache")


def test_a_bad_entry_is_removed_only_by_who_holds_the_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, cache = tiny_moe(tmp_path / "model"), tmp_path / "cache"
    logits(source, cache)
    (entry(cache) / MANIFEST).unlink()
    there = []

    @contextmanager
    def locked(path: Path, waiting: Any) -> Iterator[None]:
        there.append(entry(cache).exists())
        yield

    monkeypatch.setattr("ktcore.engine.load.packed_cache.write_lock", locked)
    logits(source, cache)
    assert there == [True]
    assert (entry(cache) / MANIFEST).exists()


def test_parts_are_on_the_disk_before_an_entry_is_published_and_one_that_cannot_be_closes_its_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    order = []
    flush, close = PartWriter.flush, LoadedModel.close

    def fails(*args: object) -> None:
        order.append("publish")
        raise CheckpointError("the disk is full")

    monkeypatch.setattr(PartWriter, "flush", lambda self: (order.append("parts"), flush(self)))
    monkeypatch.setattr(LoadedModel, "close", lambda self: (order.append("closed"), close(self)))
    monkeypatch.setattr("ktcore.engine.load.packed_cache.publish", fails)
    with pytest.raises(CheckpointError, match="the disk is full"):
        logits(tiny_moe(tmp_path / "model"), tmp_path / "cache")
    assert order == ["parts", "publish", "closed"]
