"""Packed folders by themselves, without a model that is loaded: what is written, gone on with, believed and refused."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from threading import Event
from typing import Any

import numpy as np
import pytest
import torch

from ktcore.errors import CheckpointError
from ktcore.weights import open_checkpoint
from ktcore.weights.joined import PREFIX, JoinedCheckpoint, from_experts
from ktcore.weights.packed.checkpoint import open_packed
from ktcore.weights.packed.container import MANIFEST, PARTS, TENSORS, read_manifest, write_manifest
from ktcore.weights.packed.export import ReadLog, describe_source, keep_tensors
from ktcore.weights.packed.fingerprint import files_fingerprint, model_fingerprint
from ktcore.weights.packed.lock import write_lock
from ktcore.weights.packed.parts import Part
from ktcore.weights.packed.reader import PackedMismatch, PartReader, verify
from ktcore.weights.packed.writer import JOURNAL, PartWriter
from ktcore.weights.ref import WeightRef

IDENTITY = {"model": "a", "plan": "b"}


@pytest.fixture
def part(write_folder: Callable[..., Path]) -> Part:
    """Three pieces of 5000 bytes, more than a page."""
    checkpoint = open_checkpoint(write_folder(None, {"w": torch.randn(3, 4)}))
    weight = WeightRef.of(checkpoint, "w").open(checkpoint)
    return Part("layer 0, up", "acme.tiles/3", "F32[3, 4]", [weight], pieces=3, nbytes=5000)


class Packing:
    """Fills pieces with their number, notes which it was asked for, and breaks off where told."""

    def __init__(self, part: Part, breaks: int | None = None) -> None:
        self.part, self.breaks, self.asked = part, breaks, list[int]()

    def __call__(self, piece: int) -> np.ndarray:
        if piece == self.breaks:
            raise KeyboardInterrupt
        self.asked.append(piece)
        self.part.weights[0].loss.error += 2.0 ** (piece + 1)
        self.part.weights[0].loss.value += 10.0
        return np.full(5000, piece + 1, np.uint8)


def wanted() -> np.ndarray:
    return np.arange(1, 4, dtype=np.uint8)[:, None].repeat(5000, 1)


def test_a_piece_is_written_while_the_next_one_is_packed(
    part: Part, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    packing, begun, seen = Packing(part), [Event() for _ in range(3)], list[bool]()
    plain = os.pwrite

    def fill(piece: int) -> np.ndarray:
        begun[piece].set()
        return packing(piece)

    def late(file: int, data: Any, offset: int) -> int:
        # the last one waits for nothing
        seen.append(begun[min(2, data[0])].wait(timeout=30))
        return plain(file, data, offset)

    monkeypatch.setattr(os, "pwrite", late)
    writer = PartWriter(tmp_path / "p", IDENTITY)
    assert np.array_equal(writer.get(part, fill), wanted())
    assert seen == [True] * 3
    writer.close()
    assert not [t for t in threading.enumerate() if t.name.startswith("ktcore-part-writer")]


def begun(folder: Path, part: Part) -> None:
    """A run that ended before its last piece."""
    writer = PartWriter(folder, IDENTITY)
    with pytest.raises(KeyboardInterrupt):
        writer.get(part, Packing(part, breaks=2))
    writer.close()


def finished(folder: Path, part: Part) -> dict[str, Any]:
    writer = PartWriter(folder, IDENTITY)
    writer.get(part, Packing(part))
    writer.close()
    return {"parts": writer.parts, "files": {PARTS: writer.nbytes}}


def test_an_interrupted_run_is_gone_on_with_where_it_ended(part: Part, tmp_path: Path) -> None:
    folder = tmp_path / "no/folder/yet"
    begun(folder, part)
    again, writer = Packing(part), PartWriter(folder, IDENTITY)
    assert writer.resumed == 10_000
    np.testing.assert_array_equal(writer.get(part, again), wanted())
    assert again.asked == [2]
    assert writer.nbytes == (folder / PARTS).stat().st_size == 16384  # whole pages
    assert writer.parts[part.key]["losses"] == [(2.0 + 4.0 + 8.0, 30.0)]


@pytest.mark.parametrize("damage", ["half a line", "first piece", "nonsense", "a piece of no part"])
def test_what_the_journal_says_counts_up_to_the_first_line_that_is_not_so(
    damage: str, part: Part, tmp_path: Path
) -> None:
    begun(tmp_path, part)
    journal = (tmp_path / JOURNAL).read_bytes()
    lines = journal.splitlines(keepends=True)  # identity, part, two pieces
    if damage == "half a line":
        (tmp_path / JOURNAL).write_bytes(journal[:-9])
    elif damage == "first piece":
        with (tmp_path / PARTS).open("r+b") as file:
            file.write(b"\xff")
    else:
        wrong = b"[" if damage == "nonsense" else json.dumps({"piece": "f" * 32, "sum": "", "losses": []}).encode()
        (tmp_path / JOURNAL).write_bytes(b"".join([*lines[:3], wrong, b"\n", lines[3]]))
    again, writer = Packing(part), PartWriter(tmp_path, IDENTITY)
    np.testing.assert_array_equal(writer.get(part, again), wanted())
    assert again.asked == ([0, 1, 2] if damage == "first piece" else [1, 2])
    writer.close()
    last = PartWriter(tmp_path, IDENTITY)
    assert last.resumed == 15_000, "the journal was put right"


def test_a_run_of_something_else_is_not_gone_on_with(part: Part, tmp_path: Path) -> None:
    begun(tmp_path, part)
    with pytest.raises(PackedMismatch, match="differs in: plan\n"):
        PartWriter(tmp_path, IDENTITY | {"plan": "c"})
    with pytest.raises(
        PackedMismatch, match=r"unfinished run in layout acme\.tiles/3, this ktcore writes acme\.tiles/4"
    ):
        PartWriter(tmp_path, IDENTITY).get(replace(part, layout="acme.tiles/4"), Packing(part))


def test_a_piece_of_another_size_than_announced_is_an_error_of_the_backend(part: Part, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="layer 0, up: piece 0 has 5000 bytes, announced were 4999"):
        PartWriter(tmp_path, IDENTITY).get(replace(part, nbytes=4999), Packing(part))


def test_a_finished_part_is_mapped_with_what_quantising_it_cost(part: Part, tmp_path: Path) -> None:
    body = finished(tmp_path, part)
    part.weights[0].loss.error = part.weights[0].loss.value = 0.0
    reader = PartReader(tmp_path, body)
    found = reader.get(part, lambda piece: pytest.fail("it is there"))
    assert found is not None
    np.testing.assert_array_equal(found, wanted())
    assert not found.flags.writeable
    assert (part.weights[0].loss.error, part.weights[0].loss.value) == (14.0, 30.0)
    assert reader.get(replace(part, what="another weight", kind="BF16[3, 4]"), Packing(part)) is None, "not kept here"
    for other, message in (
        (replace(part, kind="BF16[3, 4]"), r"is packed as 'F32\[3, 4\]', this plan wants 'BF16\[3, 4\]'"),
        (replace(part, layout="acme.tiles/4"), r"packed in layout acme\.tiles/3, this ktcore reads acme\.tiles/4"),
        (replace(part, pieces=1, nbytes=15_000), "packed as 3 x 5000 bytes, expected 1 x 15000"),
    ):
        with pytest.raises(PackedMismatch, match=message):
            reader.get(other, Packing(part))


def test_a_closed_writer_keeps_no_file_open_and_its_maps_stay(part: Part, tmp_path: Path) -> None:
    writer = PartWriter(tmp_path, IDENTITY)
    found = writer.get(part, Packing(part))
    descriptor = writer._file
    writer.close()
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(descriptor)
    writer.close()
    np.testing.assert_array_equal(found, wanted())


@pytest.mark.parametrize("text", [None, b"", b"{", b"\xff"])
def test_a_manifest_that_cannot_be_read_says_so(text: bytes | None, tmp_path: Path) -> None:
    if text is not None:
        (tmp_path / MANIFEST).write_bytes(text)
    with pytest.raises(CheckpointError, match=f"{MANIFEST}: cannot be read: "):
        read_manifest(tmp_path)


def test_a_closed_reader_keeps_no_file_open_and_its_maps_stay(part: Part, tmp_path: Path) -> None:
    reader = PartReader(tmp_path, finished(tmp_path, part))
    found = reader.get(part, Packing(part))
    descriptor = reader._file
    reader.close()
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(descriptor)
    reader.close()
    assert found is not None
    assert found[2, -1] == 3


def test_verifying_names_what_is_damaged(part: Part, tmp_path: Path) -> None:
    body = finished(tmp_path, part)
    seen: list[tuple[int, int]] = []
    assert verify(tmp_path, body, lambda done, total: seen.append((done, total))) == []
    assert seen == [(5000, 16384), (10_000, 16384), (15_000, 16384)]
    with (tmp_path / PARTS).open("r+b") as file:
        file.seek(5000)
        file.write(b"\xff")
    assert verify(tmp_path, body) == ["layer 0, up, piece 1"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda outer: outer.update(magic="other"), "not the manifest of a packed model"),
        (lambda outer: outer.update(version=2), "written in version 2 of the packed layout, this ktcore reads 1"),
        (lambda outer: outer["body"].update(more=1), "damaged: its checksum does not fit"),
    ],
)
def test_a_manifest_is_held_against_its_checksum_and_version(change: Any, message: str, tmp_path: Path) -> None:
    write_manifest(tmp_path, {"files": {}})
    assert read_manifest(tmp_path) == {"files": {}}
    outer = json.loads((tmp_path / MANIFEST).read_text())
    change(outer)
    (tmp_path / MANIFEST).write_text(json.dumps(outer))
    with pytest.raises(CheckpointError, match=message):
        read_manifest(tmp_path)


def test_the_manifests_files_are_there_in_their_size(tmp_path: Path) -> None:
    write_manifest(tmp_path, {"files": {PARTS: 3}})
    with pytest.raises(CheckpointError, match=rf"{PARTS}: is missing"):
        read_manifest(tmp_path)
    (tmp_path / PARTS).write_bytes(b"1234")
    with pytest.raises(CheckpointError, match="has 4 bytes, expected 3"):
        read_manifest(tmp_path)
    (tmp_path / PARTS).write_bytes(b"123")
    read_manifest(tmp_path)


def test_a_lock_keeps_others_out_until_it_is_left(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    with write_lock(path):
        with pytest.raises(CheckpointError, match="another process is writing there"), write_lock(path):
            pytest.fail("two writers")
        with pytest.raises(TimeoutError), write_lock(path, waiting=lambda: (_ for _ in ()).throw(TimeoutError)):
            pytest.fail("two writers")
    with write_lock(path):
        pass
    with pytest.raises(CheckpointError, match="cannot be written"), write_lock(tmp_path / "no/lock"):
        pytest.fail("no lock")


@pytest.fixture
def base(write_gguf: Callable[..., Path]) -> Iterator[Any]:
    tensors = {"w": (torch.randn(40, 4096).numpy(), "Q8_0"), "v": torch.randn(7).numpy()}
    with open_checkpoint(write_gguf(metadata={"general.name": "m"}, tensors=tensors)) as checkpoint:
        yield checkpoint


def test_a_change_anywhere_near_a_sample_tells_files_apart(base: Any) -> None:
    stat = base.path.stat()
    assert stat.st_size > 160_000
    seen = {files_fingerprint(base)}
    for at in (0, stat.st_size // 15 * 8, stat.st_size - 1):  # the first, one within, and the last
        with base.path.open("r+b") as file:
            file.seek(at)
            old = file.read(1)
            file.seek(at)
            file.write(bytes([old[0] ^ 1]))
        os.utime(base.path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
        seen.add(files_fingerprint(base))
    assert len(seen) == 4


def test_models_of_other_shapes_or_settings_have_other_fingerprints(base: Any) -> None:
    class Other:
        kind, config, tensors = base.kind, base.config, base.tensors

    assert model_fingerprint(Other) == model_fingerprint(base)  # type: ignore[arg-type]
    for change in (
        {"kind": "hf"},
        {"config": dict(base.config) | {"more": [1, 2]}},
        {"tensors": {k: replace(v, shape=v.shape[::-1]) for k, v in base.tensors.items()} | {"v": base.tensors["v"]}},
    ):
        other = type("Changed", (Other,), change)
        assert model_fingerprint(other) != model_fingerprint(base)  # type: ignore[arg-type]


def test_reads_are_noted_in_order_and_only_while_watched(base: Any) -> None:
    log = ReadLog(base)
    log.raw("v")
    log.rows("w", 3, 5)
    log.raw("v")
    assert list(log.read) == ["v", "w"]
    unwatched = ReadLog(base)
    unwatched.watching = False
    np.testing.assert_array_equal(unwatched.raw("w"), base.raw("w"))
    assert not unwatched.read


def packed(folder: Path, checkpoint: Any, names: list[str]) -> Path:
    """A finished folder without parts."""
    folder.mkdir()
    (folder / PARTS).write_bytes(b"")
    kept = keep_tensors(folder, checkpoint, names)
    body = describe_source(folder, checkpoint) | {"kept": kept, "parts": {}, "quantized": {"n": "INT4_G32"}}
    write_manifest(folder, body | {"files": {PARTS: 0, TENSORS: (folder / TENSORS).stat().st_size}})
    return folder


def test_kept_tensors_come_back_as_they_were(base: Any, tmp_path: Path) -> None:
    with open_packed(packed(tmp_path / "packed", base, ["v", "w"])) as found:
        assert (found.kind, found.config["general.name"], found.others) == ("gguf", "m", None)
        assert found.tensors == base.tensors
        for name in ("w", "v"):
            assert found.raw(name).tobytes() == base.raw(name).tobytes()
        assert all(entry["offset"] % 64 == 0 for entry in found._kept.values())
        with pytest.raises(CheckpointError, match="'u' is not kept here"):
            found.raw("u")
    assert verify(tmp_path / "packed", read_manifest(tmp_path / "packed")) == []


def test_an_order_of_columns_is_kept_with_its_weight(write_folder: Any, tmp_path: Path) -> None:
    index = np.random.default_rng(4).permutation(np.arange(256) // 64)
    tensors = {
        "a.qweight": torch.zeros(32, 16, dtype=torch.int32),
        "a.qzeros": torch.zeros(4, 2, dtype=torch.int32),
        "a.scales": torch.ones(4, 16).half(),
        "a.g_idx": torch.from_numpy(index.astype(np.int32)),
    }
    method = {"quant_method": "gptq", "bits": 4, "group_size": 64, "desc_act": True, "sym": True}
    with open_checkpoint(write_folder(method, tensors)) as checkpoint:
        folder = packed(tmp_path / "packed", checkpoint, ["a.weight"])
    with open_packed(folder) as found:
        np.testing.assert_array_equal(found.input_order("a.weight"), np.argsort(index, kind="stable"))


def test_an_expert_from_the_second_source_is_read_there(base: Any, write_folder: Any) -> None:
    values = torch.randn(40, 8)
    experts = open_checkpoint(write_folder(None, {"w": values, "u": values + 1}))
    joined = JoinedCheckpoint(base, experts)
    ref = from_experts(WeightRef.of(experts, "w", "u"))
    assert torch.equal(ref.open(joined).tensor(), torch.stack([values, values + 1]))
    assert joined.file_of(ref.sources[0]) == experts.file_of("w") != joined.file_of("w")


def test_of_two_sources_each_has_its_own_description(base: Any, write_folder: Any, tmp_path: Path) -> None:
    experts = open_checkpoint(write_folder(None, {"up": torch.randn(2, 3)}))
    joined = JoinedCheckpoint(base, experts)
    with open_packed(packed(tmp_path / "packed", joined, ["v", f"{PREFIX}up"])) as found:
        assert found.others is not None
        assert (found.kind, found.others.kind) == ("gguf", "hf")
        assert (set(found.tensors), set(found.others.tensors)) == ({"v", "w"}, {"up"})
        assert found.others.raw("up").tobytes() == experts.raw("up").tobytes()
        assert (found.quantized, found.others.quantized) == ({"n": "INT4_G32"}, {})


def test_small_files_of_a_folder_are_copied_and_weights_are_not(write_folder: Any, tmp_path: Path) -> None:
    source = write_folder(None, {"up": torch.randn(2, 3)})
    for name in ("tokenizer.json", "chat_template.jinja", "model.safetensors.index.json", "readme.md"):
        (source / name).write_text("{}")
    (source / "additional_chat_templates").mkdir()
    (source / "additional_chat_templates/tool.jinja").write_text("x")
    with open_checkpoint(source) as checkpoint:
        folder = packed(tmp_path / "packed", checkpoint, [])
    names = {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}
    assert names == {
        *(MANIFEST, PARTS, TENSORS, "config.json", "tokenizer.json", "chat_template.jinja"),
        "additional_chat_templates/tool.jinja",
    }


def test_a_place_that_cannot_be_written_is_named(base: Any, tmp_path: Path) -> None:
    for attempt in (lambda f: keep_tensors(f, base, ["v"]), lambda f: describe_source(f, base)):
        with pytest.raises(CheckpointError, match="cannot be written: No such file or directory"):
            attempt(tmp_path / "absent")
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="cannot be written"):
        PartWriter(tmp_path / "file", IDENTITY)


def test_a_cache_entry_is_no_model(tmp_path: Path) -> None:
    write_manifest(tmp_path, {"files": {}, "parts": {}})
    with pytest.raises(CheckpointError, match="an entry of a packed-weight cache, which needs its model"):
        open_checkpoint(tmp_path)
