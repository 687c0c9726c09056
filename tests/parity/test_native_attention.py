"""Families whose attention is out of the ordinary, on the native attention and delta net, against transformers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import ktcore

from .conftest import Tiny
from .gguf_writer import write_gguf

pytestmark = pytest.mark.usefixtures("one_thread")
FAMILIES = ["qwen3-next", "qwen3.5", "kimi-linear", "glm5-next"]
FAMILIES += ["llama4-scout", "llama4-maverick", "llama4-two", "gpt-oss", "gpt-oss-full"]
NATIVE = {
    "attention": ", kv_dtype: f32",
    "mla": ", kv_dtype: f32",
    "gated_delta_net": "",
    "kimi_delta_attention": "",
    "linear": "",
}
DELTA = {"qwen3-next": "gated_delta_net", "qwen3.5": "gated_delta_net"}
DELTA |= dict.fromkeys(("kimi-linear", "glm5-next"), "kimi_delta_attention")
REFERENCE = ("moe", "router", "experts", "mlp")


def rule_file(folder: Path, cache: str | None) -> Path:
    """Attention on the native kernels with float32 activations, experts on the references."""
    lines = "version: 1\nrules:\n"
    for op, more in NATIVE.items():
        options = "activations: f32" + more
        if cache and "kv_dtype" in more:
            options = f"activations: f32, kv_dtype: {cache}"
        lines += f"  - {{name: {op}, match: {{op: {op}}}, use: cpu.{op}, options: {{{options}}}, optional: true}}\n"
    for op in REFERENCE:
        lines += f"  - {{name: {op}, match: {{op: {op}}}, use: reference.{op}, optional: true}}\n"
    path = folder / "attention.yaml"
    path.write_text(lines)
    return path


@pytest.mark.parametrize("name", FAMILIES)
def test_native_attention_matches_transformers(name: str, tiny: Callable[[str], Tiny], tmp_path: Path) -> None:
    t = tiny(name)
    with ktcore.load(t.folder, backend="cpu", rules=rule_file(tmp_path, None), context=256, threads=2) as model:
        used = {c.implementation.id for c in model.plan.choices.values()}
        delta = DELTA.get(name, "")
        assert ("cpu.mla" if delta.startswith("kimi") else "cpu.attention") in used
        assert not delta or f"cpu.{delta}" in used
        assert not used & {f"reference.{op}" for op in (*NATIVE, "kv_cache", "token_indexer", "index_cache")}
        torch.testing.assert_close(model.logits(t.ids), t.logits, atol=2e-4, rtol=1e-4)
        prompts = torch.stack((t.ids[:40], t.ids[40:80]))
        ours = model.generate(prompts, max_new_tokens=16, temperature=0)
    assert torch.equal(ours, t.generated(prompts, 16))


def test_native_delta_net_gives_value_heads_of_gguf_files_their_own_keys(
    tiny: Callable[[str], Tiny], tmp_path: Path
) -> None:
    t = tiny("qwen3.5-moe")
    path = write_gguf(t.model, tmp_path / "tiny.gguf")
    with ktcore.load(path, backend="cpu", rules=rule_file(tmp_path, None), context=256, threads=2) as model:
        assert "cpu.gated_delta_net" in {c.implementation.id for c in model.plan.choices.values()}
        torch.testing.assert_close(model.logits(t.ids), t.logits, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["gpt-oss", "qwen3-moe", "v3"])
def test_every_cache_type_stays_close_and_is_planned(name: str, tiny: Callable[[str], Tiny], tmp_path: Path) -> None:
    t = tiny(name)
    bytes_of = {}
    for cache in ("i16", "f16", "bf16", "q8"):
        rules = rule_file(tmp_path, cache)
        with ktcore.load(t.folder, backend="cpu", rules=rules, context=256, threads=2) as model:
            bytes_of[cache] = model.plan.cache_bytes_per_token
            logits = model.logits(t.ids)
        error = (logits - t.logits).pow(2).mean().sqrt() / t.logits.std()
        assert error < {"i16": 3e-3, "f16": 3e-3, "bf16": 3e-2, "q8": 3e-2}[cache]
    assert bytes_of["bf16"] == bytes_of["f16"]
    assert 1 < bytes_of["i16"] / bytes_of["f16"] <= 1.5  # 8 bytes a row, and these rows are narrow
    assert 0.53 <= bytes_of["q8"] / bytes_of["f16"] <= 0.86  # narrow rows are filled up to 32 codes
