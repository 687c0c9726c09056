"""Reading ahead of the loader: what is asked of the system, when, and when nothing is."""

from __future__ import annotations

import os
from pathlib import Path
from queue import Empty, Queue
from typing import Any

import pytest

import ktcore
from ktcore.engine.load.read_ahead import ReadAhead
from ktcore.errors import CheckpointError
from ktcore.weights import open_checkpoint
from ktcore.weights.joined import JoinedCheckpoint
from ktcore.weights.mapped import MappedFile
from ktcore.weights.ref import WeightRef


class Asked:
    """Stands for a checkpoint; notes what it is asked for."""

    def __init__(self) -> None:
        self.names: Queue[str] = Queue()

    def ask_for(self, name: str) -> None:
        self.names.put(name)

    def take(self, count: int) -> list[str]:
        return [self.names.get(timeout=30) for _ in range(count)]


def _nodes() -> list[dict[str, WeightRef]]:
    def ref(*names: str) -> WeightRef:
        return WeightRef(names, (1, 32), "F32")

    return [{}, {"q": ref("a"), "k": ref("b"), "qk": ref("a")}, {"up": ref("c", "d")}, {"head": ref("e")}]


def test_each_tensor_is_asked_for_once_no_further_than_the_next_node() -> None:
    checkpoint = Asked()
    with ReadAhead(checkpoint, _nodes()) as ahead:  # type: ignore[arg-type]
        for expected in (["a", "b"], ["c", "d"], ["e"]):
            with pytest.raises(Empty):
                checkpoint.names.get(timeout=0.05)
            ahead.next()
            assert checkpoint.take(len(expected)) == expected


def test_closing_ends_its_thread_in_the_midst() -> None:
    with ReadAhead(Asked(), _nodes()) as ahead:  # type: ignore[arg-type]
        ahead.next()
    assert not ahead._thread.is_alive()
    with ReadAhead(Asked(), [{}, {}]) as nothing:  # type: ignore[arg-type]
        pass
    assert nothing._thread.ident is None


class Noted(ReadAhead):
    """Asks for nothing; notes what it is made with, and how often a node begins."""

    def __init__(self, checkpoint: Any, nodes: Any) -> None:
        super().__init__(checkpoint, [])
        self.nodes = nodes
        made.append(self)

    @property
    def names(self) -> set[str]:
        return {name for refs in self.nodes for ref in refs.values() for name in ref.sources}


made: list[Noted] = []


def test_loading_reads_ahead_every_tensor_but_not_where_packed_weights_are_there_already(
    smollm2_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ktcore.engine.load.loader.ReadAhead", Noted)
    made.clear()
    with open_checkpoint(smollm2_path) as checkpoint:
        every = set(checkpoint.tensors)
    for cache in (None, tmp_path, tmp_path):
        ktcore.load(smollm2_path, backend="cpu", context=64, threads=1, packed_cache=cache).close()
    # its table is its head too
    assert [ahead.names for ahead in made] == [every, every, set()]
    assert [ahead._begun for ahead in made] == [len(ahead.nodes) - 1 for ahead in made]  # all but the sampler


def test_the_system_is_told_which_bytes_of_which_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[Any] = []

    def advise(descriptor: int, offset: int, nbytes: int, advice: int) -> None:
        told.append((os.fstat(descriptor).st_ino, offset, nbytes, advice))

    monkeypatch.setattr(os, "posix_fadvise", advise, raising=False)
    monkeypatch.setattr(os, "POSIX_FADV_WILLNEED", 3, raising=False)
    path = tmp_path / "weights"
    path.write_bytes(bytes(100))
    number = path.stat().st_ino
    file = MappedFile(path)
    file.ask_for(10, 20)
    file.ask_for(10, 0)
    assert told == [(number, 10, 20, 3)]
    path.rename(tmp_path / "elsewhere")
    file.ask_for(10, 20)
    assert len(told) == 1
    monkeypatch.delattr(os, "posix_fadvise")
    file.ask_for(10, 20)
    file.close()


def test_experts_of_another_file_are_asked_for_there(smollm2_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[tuple[str, str]] = []
    with open_checkpoint(smollm2_path) as base, open_checkpoint(smollm2_path) as experts:
        for side, one in (("base", base), ("experts", experts)):
            monkeypatch.setattr(one, "ask_for", lambda name, side=side: told.append((side, name)))
        joined = JoinedCheckpoint(base, experts)
        own, other = next(iter(base.tensors)), next(n for n in joined.tensors if n not in base.tensors)
        joined.ask_for(own)
        joined.ask_for(other)
    assert told[0] == ("base", own)
    assert told[1][0] == "experts"
    assert other.endswith(told[1][1])


def test_a_tensor_that_is_not_there_cannot_be_asked_for(smollm2_path: Path) -> None:
    with open_checkpoint(smollm2_path) as checkpoint, pytest.raises(CheckpointError, match="no tensor named"):
        checkpoint.ask_for("absent")
