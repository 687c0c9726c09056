"""Tiny models through the native implementations against transformers: logits and generated tokens."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch

import ktcore

from .conftest import Tiny
from .gguf_writer import write_gguf

pytestmark = pytest.mark.usefixtures("one_thread")
IN_BOTH = [
    "mixtral",
    "qwen2-moe",
    "glm4-moe",
    "glm4-air",
    "glm4",
    "qwen3-moe",
    "minimax-m2",
    "hy3",
    "ernie",
    "mimo",
    "step",
    "hunyuan-gguf",
    "afmoe",
    "glm4-lite",
    "mistral4",
    "v3",
    "kimi-k2",
    "moonlight",
    "v32",
    "glm-dsa-shared",
    "v2-full",
    "v2-lite",
]
FAMILIES = [(name, kind) for name in IN_BOTH for kind in ("safetensors", "gguf")]
# what GGUF cannot say
FAMILIES += [("qwen3-moe-mixed", "safetensors"), ("v3-half", "safetensors"), ("phi3", "safetensors")]
FAMILIES += [("solar-open", "safetensors"), ("mistral4-groups", "safetensors"), ("dots1-window", "safetensors")]
FAMILIES += [("qwen2-moe-window", "safetensors"), ("qwen3-wide", "gguf")]
OPERATORS = {"linear": "", "mlp": "", "moe": "", "attention": ", kv_dtype: f32", "mla": ", kv_dtype: f32"}


def _exact(operators: Mapping[str, str]) -> str:
    """Rules for native operators with float32 activations; further options by operator."""
    lines = "version: 1\nrules:\n"
    for op, more in operators.items():
        lines += (
            f"  - name: exact {op}\n    match: {{op: {op}}}\n    use: cpu.{op}\n    device: accelerator\n"
            f"    options: {{activations: f32{more}}}\n    optional: true\n"
        )
    return lines


@pytest.fixture(scope="module")
def exact_rules(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A rule file: every native operator with float32 activations and a float32 cache, no fallbacks."""
    lines = _exact(OPERATORS).replace("rules:", "strict: true\nrules:")
    path = tmp_path_factory.mktemp("rules") / "exact.yaml"
    path.write_text(lines)
    return path


@pytest.mark.parametrize(("name", "kind"), FAMILIES)
def test_native_model_matches_transformers(
    name: str, kind: str, tiny: Callable[[str], Tiny], exact_rules: Path, tmp_path: Path
) -> None:
    t = tiny(name)
    path = t.folder if kind == "safetensors" else write_gguf(t.model, tmp_path / "tiny.gguf")
    with ktcore.load(path, backend="cpu", rules=exact_rules, context=256, threads=2) as model:
        used = {c.node.spec.op: c.implementation.id for c in model.plan.choices.values()}
        assert all(used.get(op, f"cpu.{op}") == f"cpu.{op}" for op in ("moe", "mla", "attention", "mlp"))
        torch.testing.assert_close(model.logits(t.ids), t.logits, atol=2e-4, rtol=1e-4)
        prompts = torch.stack((t.ids[:40], t.ids[40:80]))
        ours = model.generate(prompts, max_new_tokens=16, temperature=0)
    assert torch.equal(ours, t.generated(prompts, 16))


@pytest.mark.parametrize("kind", ["safetensors", "gguf"])
def test_parts_are_native_where_a_branch_is_composed(kind: str, tiny: Callable[[str], Tiny], tmp_path: Path) -> None:
    """A dense part with norms of its own beside experts, of which no kernel computes the whole."""
    t = tiny("gemma4")
    path = t.folder if kind == "safetensors" else write_gguf(t.model, tmp_path / "tiny.gguf")
    rules = tmp_path / "exact.yaml"
    parts = {"linear": "", "mlp": "", "experts": "", "attention": ", kv_dtype: f32"}
    rules.write_text(_exact(parts))
    with ktcore.load(path, backend="cpu", rules=rules, context=256, threads=2) as model:
        used = {c.node.spec.op: c.implementation.id for c in model.plan.choices.values()}
        assert used["moe"] == "reference.moe"
        assert all(used[op] == f"cpu.{op}" for op in ("attention", "experts", "router", "mlp", "linear", "embedding"))
        torch.testing.assert_close(model.logits(t.ids), t.logits, atol=2e-4, rtol=1e-4)
        prompts = torch.stack((t.ids[:40], t.ids[40:80]))
        ours = model.generate(prompts, max_new_tokens=16, temperature=0)
    assert torch.equal(ours, t.generated(prompts, 16))


@pytest.mark.parametrize("name", ["llama-wide", "v3", "v2-lite"])
def test_native_kernels_read_fused_projections(
    name: str, tiny: Callable[[str], Tiny], exact_rules: Path, tmp_path: Path
) -> None:
    t = tiny(name)
    path = write_gguf(
        t.model, tmp_path / "tiny.gguf", "fused", fuse_qkv=name == "llama-wide", fuse_gate_up=name == "v3"
    )
    with ktcore.load(path, backend="cpu", rules=exact_rules, context=256, threads=2) as model:
        torch.testing.assert_close(model.logits(t.ids), t.logits, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["qwen3-moe", "v3", "mixtral", "qwen2-moe", "glm4-moe", "glm4"])
def test_default_rules_stay_close(name: str, tiny: Callable[[str], Tiny]) -> None:
    t = tiny(name)
    with ktcore.load(t.folder, backend="cpu", context=256, threads=2) as model:
        logits = model.logits(t.ids)
    torch.testing.assert_close(logits, t.logits, atol=1e-2, rtol=0)


@pytest.mark.parametrize("policy", ["{keep: 2}", "{defer: 1}", "{on_device: 3, device: cpu}", "{threshold: 0.3}"])
def test_a_policy_on_experts_composes_the_branch(policy: str, tiny: Callable[[str], Tiny], tmp_path: Path) -> None:
    rules = tmp_path / "policy.yaml"
    rules.write_text(
        "version: 1\nrules:\n  - name: apart\n    match: {op: experts}\n    use: cpu.experts\n"
        f"    experts: {policy}\n"
    )
    t = tiny("qwen3-moe")
    with ktcore.load(t.folder, backend="cpu", rules=rules, context=256, threads=2) as model:
        used = {c.node.spec.op: c for c in model.plan.choices.values()}
        assert used["moe"].implementation.id == "reference.moe"
        assert "apart" in used["moe"].rejected[0].reason
        assert used["experts"].implementation.id == "cpu.experts"
        assert used["router"].implementation.id == "cpu.router"
        logits = model.logits(t.ids)
    same = "on_device" in policy
    assert torch.allclose(logits, t.logits, atol=1e-2) == same
