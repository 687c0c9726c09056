"""The option `quantize`: which weights it takes, what the plan says, and that the loaded model computes with them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, Qwen3MoeConfig

import ktcore
from ktcore.errors import PlanError, RuleError
from ktcore.weights.quantize import Loss, quantize_rows

EXPERTS = "{name: small, match: {op: experts}, use: reference.experts, options: {quantize: int4_g32}}"
LINEAR = "{name: wide, match: {op: linear, name: 'layers.*'}, use: reference.linear, options: {quantize: int8_g64}}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=256,
        hidden_size=64,
        head_dim=32,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_hidden_layers=2,
        intermediate_size=128,
        moe_intermediate_size=32,
        num_experts=8,
        num_experts_per_tok=2,
        norm_topk_prob=True,
        initializer_range=0.1,
        tie_word_embeddings=False,
    )
    path = tmp_path_factory.mktemp("tiny")
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(path)
    return path


def rules(tmp_path: Path, *lines: str) -> Path:
    file = tmp_path / "rules.yaml"
    text = "version: 1\nextends: reference\nrules:\n" + "".join(f"  - {line}\n" for line in lines)
    file.write_text(text)
    return file


def load(folder: Path, file: Path) -> ktcore.Model:
    return ktcore.load(folder, backend="cpu", rules=file)


def requantised(weight: torch.Tensor, fmt: str, group: int) -> torch.Tensor:
    """By the shipped quantiser's codes, decoded here from the format's description."""
    rows = weight.reshape(-1, weight.shape[-1])
    blocks = torch.from_numpy(quantize_rows(rows.float(), fmt, Loss(), "w")).reshape(-1, 4 + group * int(fmt[3]) // 8)
    scale = blocks[:, :2].clone().view(torch.float16).double()
    zero = blocks[:, 2:4].clone().view(torch.int16).double()
    codes = blocks[:, 4:]
    if fmt[3] == "4":
        codes = torch.stack((codes & 15, codes >> 4), -1).flatten(1)
    return ((codes.double() - zero) * scale).float().reshape(weight.shape)


def test_the_model_computes_with_the_quantised_weights(folder: Path, tmp_path: Path) -> None:
    ids = torch.arange(20)[None] * 7 % 256
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        plain = model(ids).logits[0]
        squared = {"linear": [0.0, 0.0], "experts": [0.0, 0.0]}
        for name, weight in model.named_parameters():
            # the router is `mlp.gate`
            op = "experts" if ".experts." in name else "linear" if "_proj" in name else None
            if op is None:
                continue
            fmt, group = ("INT4_G32", 32) if op == "experts" else ("INT8_G64", 64)
            new = requantised(weight.data, fmt, group)
            squared[op][0] += float((new - weight).double().square().sum())
            squared[op][1] += float(weight.double().square().sum())
            weight.data = new
        expected = model(ids).logits[0]
    with load(folder, rules(tmp_path, EXPERTS, LINEAR)) as loaded:
        logits = loaded.logits(ids[0].tolist())
        torch.testing.assert_close(logits.reshape(expected.shape), expected, atol=1e-4, rtol=0)
        for op, (error, value) in squared.items():
            assert loaded.quantization_error[op] == pytest.approx((error / value) ** 0.5, rel=1e-4)
        assert set(loaded.quantization_error) == {"linear", "experts"}
        assert loaded.quantization_error["linear"] < 0.01 < loaded.quantization_error["experts"] < 0.1
    assert (expected - plain).abs().max() > 0.01, "the model must notice"


def test_the_plan_shows_what_is_quantised_and_how_much_it_takes(folder: Path, tmp_path: Path) -> None:
    with load(folder, rules(tmp_path, EXPERTS)) as loaded:
        choice = loaded.plan.choices["layers.1.ffn.experts"]
        assert choice.quantize == "INT4_G32"
        assert choice.node.spec.formats() == ("INT4_G32",)
        assert choice.stored_bytes == 3 * 8 * 64 * 32 * 4
        assert choice.node.nbytes == 3 * 8 * 64 * 32 // 32 * 20
        assert loaded.plan.graph.node("layers.1.ffn").spec.experts.gate_format == "INT4_G32"
        assert "quantised to INT4_G32" in choice.why
        assert "quantised INT4_G32 while loading" in loaded.plan.explain("layers.1.ffn.experts")
        assert loaded.plan.to_dict()["nodes"]["layers.1.ffn.experts"]["quantize"] == "INT4_G32"
        assert loaded.plan.choices["layers.1.attn.q"].quantize is None


def test_a_format_that_does_not_fit_the_rows_is_an_error(folder: Path, tmp_path: Path) -> None:
    file = rules(tmp_path, EXPERTS.replace("int4_g32", "int4_g128"))
    with pytest.raises(
        PlanError, match=r"layers\.0\.ffn\.experts.*rows of 64 values.*128[\s\S]*groups of 64 or 32 fit"
    ):
        load(folder, file)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (EXPERTS.replace("int4_g32", "int5"), r"rules.yaml:4.*quantize='int5' is unknown[\s\S]*int4_g32"),
        (
            "{name: none, match: {op: rms_norm}, use: reference.rms_norm, options: {quantize: int8_g32}}",
            r"rules.yaml:4.*layers.0.attn.norm \(rms_norm\) holds no float matrix to quantise",
        ),
    ],
)
def test_bad_options_name_the_rule(line: str, message: str, folder: Path, tmp_path: Path) -> None:
    with pytest.raises(RuleError, match=message):
        load(folder, rules(tmp_path, line))


def test_a_fused_native_branch_runs_quantised_experts(folder: Path, tmp_path: Path) -> None:
    native = pytest.importorskip("ktcore_cpu._native")
    if "INT8_G32" not in native.formats():
        pytest.skip("no kernel for INT8_G32 in this build")
    ids = [i * 7 % 256 for i in range(20)]
    options = "options: {quantize: int8_g32"
    with load(folder, rules(tmp_path, EXPERTS.replace("options: {quantize: int4_g32", options))) as plain:
        expected = plain.logits(ids)
    file = rules(tmp_path, f"{{name: fused, match: {{op: moe}}, use: cpu.moe, {options}, activations: f32}}}}")
    with load(folder, file) as loaded:
        choice = loaded.plan.choices["layers.0.ffn"]
        assert choice.implementation.id == "cpu.moe"
        assert choice.options == {"activations": "f32"}
        assert set(loaded.quantization_error) == {"experts"}
        torch.testing.assert_close(loaded.logits(ids), expected, atol=2e-3, rtol=0)
