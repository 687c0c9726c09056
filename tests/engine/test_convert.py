"""A converted model gives the source's numbers without the source, survives a kill, and is refused when it is wrong."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import DeepseekV2Config, DeepseekV2ForCausalLM

import ktcore
from ktcore.engine.load.convert import LOCK, SPARE, convert, publish
from ktcore.errors import CheckpointError, RuleError
from ktcore.weights.packed.container import MANIFEST, PARTS, read_manifest
from ktcore.weights.packed.reader import verify
from ktcore.weights.packed.writer import JOURNAL, PartWriter

from .tiny_sources import llama_gguf, tiny_moe

IDS = list(range(3, 40))
QUANTISE = "version: 1\nrules:\n  - {name: small, match: {op: moe}, use: [cpu.moe], options: {quantize: int4_g64}}\n"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_moe(tmp_path_factory.mktemp("model"))


def logits(path: Path, **options: Any) -> torch.Tensor:
    with ktcore.load(path, backend="cpu", **options) as model:
        return model.logits(IDS)


def rules_file(folder: Path) -> Path:
    path = folder / "small.yaml"
    path.write_text(QUANTISE)
    return path


@pytest.mark.parametrize("how", ["as it is", "experts", "rules"])
def test_runs_without_its_source_and_gives_the_same_numbers(source: Path, tmp_path: Path, how: str) -> None:
    rules = rules_file(tmp_path)
    expected = logits(source, rules=None if how == "as it is" else rules)
    moved = Path(shutil.copytree(source, tmp_path / "source"))
    options: dict[str, Any] = {"as it is": {}, "experts": {"experts": "int4_g64"}, "rules": {"rules": rules}}[how]
    done = convert(moved, tmp_path / "packed", backend="cpu", **options)
    shutil.rmtree(moved)

    torch.testing.assert_close(logits(tmp_path / "packed"), expected, rtol=0, atol=0)
    assert not verify(tmp_path / "packed", read_manifest(tmp_path / "packed"))
    assert not (tmp_path / "packed.partial").exists()
    assert done.packed_bytes == (tmp_path / "packed" / PARTS).stat().st_size
    with ktcore.load(tmp_path / "packed", backend="cpu") as model:
        assert model.quantization_error == done.errors
        assert bool(model.quantization_error) == (how != "as it is")


def test_latent_attention_and_dense_layers(tmp_path: Path) -> None:
    torch.manual_seed(1)
    config = DeepseekV2Config(
        vocab_size=256,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        intermediate_size=96,
        moe_intermediate_size=32,
        n_routed_experts=8,
        num_experts_per_tok=2,
        n_shared_experts=1,
        first_k_dense_replace=1,
        q_lora_rank=None,
        kv_lora_rank=32,
        qk_nope_head_dim=16,
        qk_rope_head_dim=8,
        v_head_dim=16,
        topk_method="greedy",
        n_group=None,
        topk_group=None,
    )
    DeepseekV2ForCausalLM(config).save_pretrained(tmp_path / "source")
    expected = logits(tmp_path / "source")
    convert(tmp_path / "source", tmp_path / "packed", backend="cpu")
    shutil.rmtree(tmp_path / "source")
    torch.testing.assert_close(logits(tmp_path / "packed"), expected, rtol=0, atol=0)


def test_gguf_with_its_metadata(tmp_path: Path) -> None:
    source = llama_gguf(tmp_path / "model.gguf")
    expected = logits(source)
    convert(source, tmp_path / "packed", backend="cpu")
    source.unlink()
    torch.testing.assert_close(logits(tmp_path / "packed"), expected, rtol=0, atol=0)


def test_experts_from_another_checkpoint(source: Path, tmp_path: Path) -> None:
    other = tiny_moe(tmp_path / "other", seed=1)
    expected = logits(source, experts_from=other)
    assert not torch.equal(expected, logits(source))
    convert(source, tmp_path / "packed", experts_from=other, backend="cpu")
    shutil.rmtree(other)
    torch.testing.assert_close(logits(tmp_path / "packed"), expected, rtol=0, atol=0)


def test_dense_tensors_kept_for_other_backends(source: Path, tmp_path: Path) -> None:
    plain = convert(source, tmp_path / "plain", backend="cpu")
    done = convert(source, tmp_path / "packed", keep_dense=True, backend="cpu")
    assert done.kept_bytes > plain.kept_bytes
    body = read_manifest(tmp_path / "packed")
    assert "model.layers.0.self_attn.q_proj.weight" in body["kept"]
    assert not any(".experts." in name for name in body["kept"])


class Killed(BaseException):
    """Stands for the signal that ends a process: nothing may catch it."""


@pytest.mark.parametrize("after", [1, 6, 13])
def test_goes_on_after_a_kill(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after: int) -> None:
    target, written = tmp_path / "packed", []
    plain = PartWriter._write

    def dies(self: PartWriter, offset: int, data: Any) -> None:
        if len(written) == after:
            plain(self, offset, data[: len(data) // 2])
            raise Killed
        written.append(data.nbytes)
        plain(self, offset, data)

    with monkeypatch.context() as patched:
        patched.setattr(PartWriter, "_write", dies)
        with pytest.raises(Killed):
            convert(source, target, experts="int4_g64", backend="cpu")
    assert not target.exists()

    done = convert(source, target, experts="int4_g64", backend="cpu")
    assert done.resumed_bytes == sum(written)
    assert not verify(target, read_manifest(target))
    convert(source, tmp_path / "once", experts="int4_g64", backend="cpu")
    assert (target / PARTS).read_bytes() == (tmp_path / "once" / PARTS).read_bytes()
    again = ktcore.load(target, backend="cpu")
    with again, ktcore.load(tmp_path / "once", backend="cpu") as once:
        assert again.quantization_error == pytest.approx(once.quantization_error)


def unfinished(source: Path, target: Path, monkeypatch: pytest.MonkeyPatch, **options: Any) -> Path:
    """A conversion that ended after some pieces."""
    plain, count = PartWriter._write, iter(range(100))

    def dies(self: PartWriter, offset: int, data: Any) -> None:
        if next(count) == 9:
            raise Killed
        plain(self, offset, data)

    with monkeypatch.context() as patched, pytest.raises(Killed):
        patched.setattr(PartWriter, "_write", dies)
        convert(source, target, backend="cpu", **options)
    return target.with_name(target.name + ".partial")


def test_a_damaged_piece_of_an_earlier_run_is_written_again(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    partial = unfinished(source, tmp_path / "packed", monkeypatch)
    with (partial / PARTS).open("r+b") as file:
        file.write(b"\xff" * 64)
    assert convert(source, tmp_path / "packed", backend="cpu").resumed_bytes == 0
    assert not verify(tmp_path / "packed", read_manifest(tmp_path / "packed"))


def test_another_models_unfinished_run_is_refused(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    unfinished(source, tmp_path / "packed", monkeypatch)
    with pytest.raises(CheckpointError, match="differs in: plan"):
        convert(source, tmp_path / "packed", experts="int4_g64", backend="cpu")
    other = tiny_moe(tmp_path / "other", seed=1)
    with pytest.raises(CheckpointError, match="differs in: files of the model"):
        convert(other, tmp_path / "packed", backend="cpu")
    wider = tiny_moe(tmp_path / "wider", num_experts=4)
    with pytest.raises(CheckpointError, match="differs in: files of the model, model") as error:
        convert(wider, tmp_path / "packed", backend="cpu")
    assert "delete" in str(error.value)


@pytest.fixture
def packed(source: Path, tmp_path: Path) -> Path:
    convert(source, tmp_path / "packed", backend="cpu")
    return tmp_path / "packed"


def edit(packed: Path, change: Any, seal: bool) -> None:
    from ktcore.weights.packed.container import canonical, digest

    manifest = json.loads((packed / MANIFEST).read_text())
    change(manifest)
    if seal:
        manifest["checksum"] = digest(canonical(manifest["body"]))
    (packed / MANIFEST).write_text(json.dumps(manifest))


def test_another_version_of_the_folder_is_refused(packed: Path) -> None:
    edit(packed, lambda m: m.update(version=99), seal=True)
    with pytest.raises(CheckpointError, match=r"version 99.*reads 1\n.*ktcore convert"):
        logits(packed)


def test_another_version_of_a_layout_is_refused(packed: Path) -> None:
    def change(manifest: dict[str, Any]) -> None:
        for part in manifest["body"]["parts"].values():
            part["layout"] = "cpu.panels/0"

    edit(packed, change, seal=True)
    with pytest.raises(CheckpointError, match=r"layout cpu.panels/0, this ktcore reads cpu.panels/\d+\n.*convert"):
        logits(packed)


def test_damage_of_the_manifest_is_found_when_loading(packed: Path) -> None:
    edit(packed, lambda m: m["body"]["quantized"].update(head="INT4_G32"), seal=False)
    with pytest.raises(CheckpointError, match="checksum"):
        logits(packed)


@pytest.mark.parametrize("name", [PARTS, "tensors.bin"])
@pytest.mark.parametrize("how", ["missing", "cut"])
def test_missing_and_cut_files_are_found_when_loading(packed: Path, name: str, how: str) -> None:
    if how == "missing":
        (packed / name).unlink()
    else:
        with (packed / name).open("r+b") as file:
            file.truncate(1000)
    with pytest.raises(CheckpointError, match=f"{name}: (is missing|has 1000 bytes)"):
        logits(packed)


@pytest.mark.parametrize("name", [PARTS, "tensors.bin"])
def test_a_flipped_bit_is_found_by_verifying(packed: Path, name: str) -> None:
    at = 0 if name == PARTS else 64
    with (packed / name).open("r+b") as file:
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ 1]))
    assert len(verify(packed, read_manifest(packed))) == 1


def test_weights_that_only_another_plan_reads_are_named(packed: Path) -> None:
    with pytest.raises(CheckpointError, match="convert"):
        logits(packed, rules="reference")


def test_refusals(source: Path, packed: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"exists already\n  give another name"):
        convert(source, packed, backend="cpu")
    with pytest.raises(CheckpointError, match="converted model already"):
        convert(packed, tmp_path / "again", backend="cpu")
    with pytest.raises(CheckpointError, match="int4_g128"):
        convert(source, tmp_path / "x", experts="int5", backend="cpu")
    with pytest.raises((CheckpointError, RuleError), match="groups of"):
        convert(source, tmp_path / "x", experts="int4_g128", backend="cpu")
    blocked = tmp_path / "file"
    blocked.write_text("")
    with pytest.raises(CheckpointError, match="cannot be written"):
        convert(source, blocked / "below", backend="cpu")
    assert not (tmp_path / "x").exists()


def test_a_full_disk_is_a_clean_error_and_can_be_gone_on_from(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import errno

    plain, calls = os.pwrite, iter(range(1000))

    def full(descriptor: int, data: Any, offset: int) -> int:
        if next(calls) == 7:
            raise OSError(errno.ENOSPC, "No space left on device")
        return plain(descriptor, data, offset)

    with monkeypatch.context() as patched:
        patched.setattr(os, "pwrite", full)
        with pytest.raises(CheckpointError, match=r"No space left on device\n.*goes on"):
            convert(source, tmp_path / "packed", backend="cpu")
    assert not (tmp_path / "packed").exists()
    assert convert(source, tmp_path / "packed", backend="cpu").resumed_bytes > 0


def test_too_little_room_is_known_before(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(100, 90, 10))  # type: ignore[attr-defined]
    with pytest.raises(CheckpointError, match=r"needs about .* free"):
        convert(source, tmp_path / "packed", backend="cpu")


def test_a_dry_run_writes_nothing(source: Path, tmp_path: Path) -> None:
    done = convert(source, tmp_path / "packed", experts="int4_g64", backend="cpu", dry_run=True)
    assert list(tmp_path.iterdir()) == []
    assert 0 < done.packed_bytes < done.source_bytes
    assert (done.kept_bytes, done.resumed_bytes, done.errors) == (0, 0, None)


def test_what_an_earlier_run_has_written_counts_as_room(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    planned = convert(source, tmp_path / "packed", backend="cpu", dry_run=True).packed_bytes
    needed = math.ceil(planned * SPARE)
    partial = tmp_path / "packed.partial"
    partial.mkdir()
    (partial / PARTS).write_bytes(bytes(1000))

    def locked(path: Path) -> None:
        raise Killed

    monkeypatch.setattr("ktcore.engine.load.convert.write_lock", locked)
    for free, ends in ((needed - 1001, CheckpointError), (needed - 1000, Killed)):
        monkeypatch.setattr(shutil, "disk_usage", lambda path, free=free: shutil._ntuple_diskusage(0, 0, free))  # type: ignore[attr-defined, misc]
        with pytest.raises(ends):
            convert(source, tmp_path / "packed", backend="cpu")


def test_a_folder_that_another_process_finished_meanwhile_is_left_alone(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    @contextmanager
    def waited(path: Path) -> Iterator[None]:
        (tmp_path / "packed").mkdir()
        yield

    monkeypatch.setattr("ktcore.engine.load.convert.write_lock", waited)
    with pytest.raises(CheckpointError, match=r"exists already\n  another process has finished it"):
        convert(source, tmp_path / "packed", backend="cpu")
    assert not list((tmp_path / "packed").iterdir())


def test_parts_are_on_the_disk_before_the_manifest_says_that_they_are_there(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    order = []
    monkeypatch.setattr(PartWriter, "flush", lambda self: order.append("parts"))
    monkeypatch.setattr("ktcore.engine.load.convert.publish", lambda *args: order.append("published"))
    convert(source, tmp_path / "packed", backend="cpu")
    assert order == ["parts", "published"]


def test_publishing_leaves_no_scaffolding_and_nothing_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    partial, opened = tmp_path / "a.partial", set[int]()
    partial.mkdir()
    for name in (JOURNAL, LOCK, PARTS):
        (partial / name).write_text("x")
    plain_open, plain_close = os.open, os.close

    def opens(*args: Any, **more: Any) -> int:
        opened.add(descriptor := plain_open(*args, **more))
        return descriptor

    def closes(descriptor: int) -> None:
        opened.discard(descriptor)
        plain_close(descriptor)

    monkeypatch.setattr(os, "open", opens)
    monkeypatch.setattr(os, "close", closes)
    publish(partial, tmp_path / "a", {"files": {}})
    assert opened == set()
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == sorted([MANIFEST, PARTS])
    assert not partial.exists()
