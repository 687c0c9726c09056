"""Every family's experts and routers on the native kernels, fused and apart, against transformers or a torch model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import ktcore

from . import smallthinker
from .conftest import Tiny

pytestmark = pytest.mark.usefixtures("one_thread")
FAMILIES = ["llama4-scout", "llama4-maverick", "llama4-two", "gpt-oss", "gpt-oss-full", "qwen3-next", "mixtral"]
FAMILIES += ["qwen2-moe", "glm4-moe", "qwen3.5-moe"]
NATIVE = {"attention": ", kv_dtype: f32", "gated_delta_net": "", "linear": "", "mlp": "", "experts": ""}


def rule_file(folder: Path, fused: bool) -> Path:
    """Native operators with float32 activations and cache; the MoE branch as one call or composed of native parts."""
    lines = "version: 1\nrules:\n"
    for op, more in NATIVE.items():
        options = f"options: {{activations: f32{more}}}"
        lines += f"  - {{name: {op}, match: {{op: {op}}}, use: cpu.{op}, {options}, optional: true}}\n"
    branch = "use: cpu.moe, options: {activations: f32}" if fused else "use: reference.moe"
    lines += f"  - {{name: moe, match: {{op: moe}}, {branch}}}\n"
    lines += "  - {name: router, match: {op: router}, use: cpu.router, optional: true}\n"
    path = folder / "experts.yaml"
    path.write_text(lines)
    return path


def check_choices(model: ktcore.Model, fused: bool) -> None:
    """The branch, or else its router and its experts, are the native ones everywhere."""
    used = {c.node.spec.op: set[str]() for c in model.plan.choices.values()}
    for c in model.plan.choices.values():
        used[c.node.spec.op].add(c.implementation.id)
    if fused:
        assert used["moe"] == {"cpu.moe"}
        return
    assert used["moe"] == {"reference.moe"}
    assert used["experts"] == {"cpu.experts"}
    assert used["router"] == {"cpu.router"}


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "apart"])
@pytest.mark.parametrize("name", FAMILIES)
def test_native_experts_match_transformers(name: str, fused: bool, tiny: Callable[[str], Tiny], tmp_path: Path) -> None:
    t = tiny(name)
    with ktcore.load(t.folder, backend="cpu", rules=rule_file(tmp_path, fused), context=256, threads=2) as model:
        check_choices(model, fused)
        torch.testing.assert_close(model.logits(t.ids), t.logits, atol=2e-4, rtol=1e-4)
        prompts = torch.stack((t.ids[:40], t.ids[40:80]))
        ours = model.generate(prompts, max_new_tokens=16, temperature=0)
    with torch.no_grad():
        theirs = t.model.generate(prompts, max_new_tokens=16, do_sample=False, eos_token_id=None)
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "apart"])
@pytest.mark.parametrize("softmax", [False, True])
def test_native_experts_match_smallthinker(softmax: bool, fused: bool, tmp_path: Path) -> None:
    c = smallthinker.CONFIG | {"moe_primary_router_apply_softmax": softmax}
    w = smallthinker.weights(c)
    ids = torch.randint(3, 256, (96,), generator=torch.Generator().manual_seed(1))
    folder = smallthinker.save_folder(c, w, tmp_path)
    with ktcore.load(folder, backend="cpu", rules=rule_file(tmp_path, fused), context=256, threads=2) as model:
        check_choices(model, fused)
        torch.testing.assert_close(model.logits(ids), smallthinker.logits(c, w, ids), atol=2e-4, rtol=1e-4)
