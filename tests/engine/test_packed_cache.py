"""The packed-weight cache: same numbers, packed once, never used when it is stale or damaged."""

from __future__ import annotations

import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

import ktcore
from ktcore.errors import CheckpointError
from ktcore.weights.packed.container import MANIFEST, PARTS
from ktcore.weights.packed.parts import Fill, Part
from ktcore.weights.packed.writer import PartWriter

IDS = list(range(3, 40))


@pytest.fixture(autouse=True)
def _log_reaches_caplog(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """Other libraries' logging set-up, run in this process by an earlier test, disables loggers that exist by then."""
    monkeypatch.setattr(logging.getLogger("ktcore"), "disabled", False)
    monkeypatch.setattr(logging.getLogger("ktcore"), "propagate", True)
    monkeypatch.setattr(logging.root.manager, "disable", 0)
    caplog.set_level(logging.WARNING, logger="ktcore")


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


def moe(folder: Path, seed: int = 0) -> Path:
    torch.manual_seed(seed)
    config = Qwen3MoeConfig(
        vocab_size=256,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        intermediate_size=96,
        moe_intermediate_size=64,
        num_experts=8,
        num_experts_per_tok=2,
        max_position_embeddings=512,
    )
    Qwen3MoeForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    return folder


def llama_gguf(path: Path) -> Path:
    """Random weights, Q8_0."""
    rng = np.random.default_rng(0)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(512)
    writer.add_embedding_length(64)
    writer.add_block_count(1)
    writer.add_feed_forward_length(96)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(256)
    shapes = {"attn_q": (64, 64), "attn_k": (32, 64), "attn_v": (32, 64), "attn_output": (64, 64)}
    shapes |= {"ffn_gate": (96, 64), "ffn_up": (96, 64), "ffn_down": (64, 96)}
    tensors = {"token_embd.weight": (256, 64), "output.weight": (256, 64)}
    for name, shape in {**tensors, **{f"blk.0.{n}.weight": s for n, s in shapes.items()}}.items():
        values = rng.standard_normal(shape).astype(np.float32) / 8
        raw = gguf.quants.quantize(values, gguf.GGMLQuantizationType.Q8_0)
        writer.add_tensor(name, raw, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    for name in ("output_norm.weight", "blk.0.attn_norm.weight", "blk.0.ffn_norm.weight"):
        writer.add_tensor(name, np.ones(64, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(params=["folder", "gguf"])
def source(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return moe(tmp_path / "model") if request.param == "folder" else llama_gguf(tmp_path / "model.gguf")


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
    source, cache = moe(tmp_path / "model"), tmp_path / "cache"
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
    logits(moe(tmp_path / "model"), cache)
    packs.clear()
    shutil.rmtree(tmp_path / "model")
    changed = moe(tmp_path / "model", seed=1)
    torch.testing.assert_close(logits(changed, cache), logits(changed, None), rtol=0, atol=0)
    assert packs
    assert "stale" in caplog.text


def test_a_copied_entry_is_checked_and_used(tmp_path: Path, packs: list[str]) -> None:
    source = moe(tmp_path / "model")
    logits(source, tmp_path / "cache")
    packs.clear()
    shutil.copytree(tmp_path / "cache", tmp_path / "copy", copy_function=shutil.copyfile)
    logits(source, tmp_path / "copy")
    assert packs == []


def test_other_rules_have_an_entry_of_their_own(tmp_path: Path) -> None:
    source, cache = moe(tmp_path / "model"), tmp_path / "cache"
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
from pathlib import Path
import ktcore
with ktcore.load(Path(sys.argv[1]), backend="cpu", threads=1, packed_cache=sys.argv[2]) as model:
    print(model.logits(range(3, 40))[-1].tolist())
"""


def test_processes_that_begin_at_once_agree(tmp_path: Path) -> None:
    source, cache = moe(tmp_path / "model"), tmp_path / "cache"
    command = [sys.executable, "-c", LOAD, str(source), str(cache)]
    workers = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    answers = [worker.communicate()[0] for worker in workers]
    assert answers == [f"{logits(source, None)[-1].tolist()}\n"] * 3
    assert len([p for p in cache.iterdir() if p.is_dir()]) == 1


def test_a_cache_that_cannot_be_written_is_a_clean_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="cannot be written"):
        logits(moe(tmp_path / "model"), tmp_path / "file" / "cache")
