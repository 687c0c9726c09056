"""`packing: fast`: weights that take more memory give the same numbers, plans say both sizes, files hold one."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from ktcore_cpu import _native, packings

import ktcore
from ktcore.engine.load.convert import convert
from ktcore.errors import CheckpointError, PlanError, RequestError, RuleError
from ktcore.rules.plan import Plan

WIDTH = 256
IDS = list(range(3, 20))
LATTICE = ("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S")


def blocks(format: str, rows: int, seed: int) -> np.ndarray:
    """Random blocks [rows, bytes of WIDTH values] that begin with a small scale."""
    raw = np.random.default_rng(seed).integers(0, 256, (rows, _native.formats()[format][1]), np.uint8)
    raw[:, :2] = np.float16([0.004]).view(np.uint8)
    return raw


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A llama whose MLP is IQ1_S and IQ3_S, the rest Q8_0."""
    path = tmp_path / "model.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(512)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(1)
    writer.add_feed_forward_length(WIDTH)
    writer.add_head_count(4)
    writer.add_head_count_kv(4)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(WIDTH)
    kinds = dict.fromkeys(("blk.0.attn_q", "blk.0.attn_k", "blk.0.attn_v", "blk.0.attn_output"), "Q8_0")
    kinds |= {"token_embd": "Q8_0", "output": "Q8_0"}
    kinds |= {"blk.0.ffn_gate": "IQ1_S", "blk.0.ffn_up": "IQ1_S", "blk.0.ffn_down": "IQ3_S"}
    for seed, (name, kind) in enumerate(kinds.items()):
        values = np.random.default_rng(seed).standard_normal((WIDTH, WIDTH)).astype(np.float32) / 16
        dtype = gguf.GGMLQuantizationType[kind]
        raw = gguf.quants.quantize(values, dtype) if kind == "Q8_0" else blocks(kind, WIDTH, seed)
        writer.add_tensor(f"{name}.weight", raw, raw_dtype=dtype)
    for name in ("output_norm", "blk.0.attn_norm", "blk.0.ffn_norm"):
        writer.add_tensor(f"{name}.weight", np.ones(WIDTH, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def logits(path: Path, packing: str | None = None, cache: Path | None = None) -> tuple[torch.Tensor, Plan]:
    with ktcore.load(path, backend="cpu", packing=packing, packed_cache=cache) as model:
        return model.logits(IDS), model.plan


def test_fast_weights_give_the_numbers_of_compact_ones(source: Path) -> None:
    compact, small = logits(source)
    fast, large = logits(source, "fast")
    apart = (compact - fast).abs() / compact.abs().max()
    assert apart.median() <= 1e-6
    assert apart.max() <= 5e-3  # an activation whose 8-bit code is another one
    sizes = large.packings()
    assert sizes == small.packings()
    assert sizes["fast"] > sizes["compact"]
    for plan, name in ((small, "compact"), (large, "fast")):
        assert sum(choice.packed_bytes for choice in plan.choices.values()) == sizes[name]
        assert plan.memory()["cpu:0"].weights == sizes[name]
    chosen = next(name for name, c in large.choices.items() if len(set(c.packings.values())) > 1)
    assert "packing=fast" in large.explain(chosen)
    assert "compact, " in large.explain(chosen)


def test_a_rule_has_the_word_before_the_caller(source: Path, tmp_path: Path) -> None:
    rules = tmp_path / "own.yaml"
    text = "version: 1\nrules:\n  - {name: a, match: {op: mlp}, use: cpu.mlp, options: {packing: %s}}\n"
    rules.write_text(text % "compact")
    with ktcore.load(source, backend="cpu", rules=rules, packing="fast") as model:
        (mlp,) = (c for c in model.plan.choices.values() if c.implementation.id == "cpu.mlp")
        assert mlp.options["packing"] == "compact"
        assert mlp.packed_bytes == mlp.packings["compact"]
    rules.write_text(text % "loose")
    with pytest.raises(RuleError, match=r"own.yaml:3.*packing='loose' is unknown\n.*known: compact, fast"):
        ktcore.load(source, backend="cpu", rules=rules)


def test_packed_weights_on_disk_hold_one_packing_and_are_refused_for_the_other(source: Path, tmp_path: Path) -> None:
    folder = tmp_path / "packed"
    convert(source, folder, backend="cpu", packing="fast")
    assert torch.equal(logits(folder, "fast")[0], logits(source, "fast")[0])
    with pytest.raises(CheckpointError, match=r"is packed as '.*IQ1_S_FAST .*', this plan wants '.*IQ1_S .*'"):
        logits(folder)
    with pytest.raises(CheckpointError, match="rules and the packing"):
        logits(folder, "compact")


def test_a_cache_has_an_entry_for_each_packing(source: Path, tmp_path: Path) -> None:
    for packing in (None, "fast", None, "fast"):
        assert torch.equal(logits(source, packing, tmp_path / "cache")[0], logits(source, packing)[0])
    assert len([p for p in (tmp_path / "cache").iterdir() if p.is_dir()]) == 2


def test_a_packing_that_nothing_has_is_refused(source: Path) -> None:
    with pytest.raises(RequestError, match="packing cannot be 'loose'"):
        ktcore.load(source, packing="loose")
    with pytest.raises(PlanError, match="packing fast means nothing here"):
        ktcore.load(source, backend="cpu", rules="reference", packing="fast")


@pytest.mark.parametrize("isa", _native.isa_supported() + _native.isa_emulated())
def test_what_is_fast_depends_on_the_instruction_set(isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KTCORE_ISA", isa)
    fast = {name for name in _native.formats() if packings.fast_format(name) != name}
    assert fast == (packings.PAYS_THERE if isa in packings.PERMUTING else set(LATTICE))
