"""Whole quantised folders: transformers' logits of the dequantised weights, for every method."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from transformers import AutoModelForCausalLM

import ktcore
from ktcore.errors import PlanError
from ktcore.ops import ExpertsSpec
from ktcore.weights import open_checkpoint

from .conftest import Tiny
from .driver import Runner

pytestmark = pytest.mark.usefixtures("one_thread")
TOLERANCE = 1e-4
GROUP = 32
Tensors = dict[str, torch.Tensor]
Encoder = Callable[[torch.Tensor, torch.Generator], tuple[Tensors, torch.Tensor]]


def rounded(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes 0 to 15 with zero point 8, and scales [out, groups] that float16 and bfloat16 hold."""
    groups = weight.reshape(weight.shape[0], -1, GROUP)
    scale = (groups.abs().amax(-1) / 7).bfloat16().half().float()
    codes = (groups / scale[..., None]).round().clamp(-8, 7) + 8
    return codes.reshape(weight.shape).long(), scale


def words(codes: torch.Tensor, axis: int, order: tuple[int, ...] = tuple(range(8))) -> torch.Tensor:
    """Eight codes a word along an axis; code order[n] of eight lies in nibble n."""
    codes = codes.movedim(axis, -1).unflatten(-1, (-1, 8))
    packed = sum(codes[..., source] << (4 * nibble) for nibble, source in enumerate(order))
    return packed.where(packed < 2**31, packed - 2**32).int().movedim(-1, axis).contiguous()


def values(codes: torch.Tensor, scale: torch.Tensor, index: torch.Tensor | None = None) -> torch.Tensor:
    index = torch.arange(codes.shape[1]) // GROUP if index is None else index
    return ((codes - 8).double() * scale.double()[:, index]).float()


def gptq(weight: torch.Tensor, generator: torch.Generator) -> tuple[Tensors, torch.Tensor]:
    codes, scale = rounded(weight)
    index = torch.arange(weight.shape[1]) // GROUP
    return _gptq(codes, scale, index)


def gptq_act_order(weight: torch.Tensor, generator: torch.Generator) -> tuple[Tensors, torch.Tensor]:
    codes, scale = rounded(weight)
    index = (torch.arange(weight.shape[1]) // GROUP)[torch.randperm(weight.shape[1], generator=generator)]
    return _gptq(codes, scale, index)


def _gptq(codes: torch.Tensor, scale: torch.Tensor, index: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
    zeros = torch.full(scale.T.shape, 7)  # version 1 stores 1 less
    tensors = {"qweight": words(codes.T, 0), "qzeros": words(zeros, 1), "scales": scale.T.half(), "g_idx": index.int()}
    return tensors, values(codes, scale, index)


def awq(weight: torch.Tensor, generator: torch.Generator) -> tuple[Tensors, torch.Tensor]:
    codes, scale = rounded(weight)
    order = (0, 2, 4, 6, 1, 3, 5, 7)
    zeros = torch.full(scale.T.shape, 8)
    tensors = {"qweight": words(codes.T, 1, order), "qzeros": words(zeros, 1, order), "scales": scale.T.half()}
    return tensors, values(codes, scale)


def packed(weight: torch.Tensor, generator: torch.Generator) -> tuple[Tensors, torch.Tensor]:
    codes, scale = rounded(weight)
    shape = torch.tensor(weight.shape)
    tensors = {"weight_packed": words(codes, 1), "weight_scale": scale.bfloat16(), "weight_shape": shape}
    return tensors, values(codes, scale)


def fp8(weight: torch.Tensor, generator: torch.Generator) -> tuple[Tensors, torch.Tensor]:
    grid = [-(-n // 128) for n in weight.shape]
    scale = torch.rand(grid, generator=generator) * 1e-3 + 1e-3
    wide = scale.repeat_interleave(128, 0).repeat_interleave(128, 1)[: weight.shape[0], : weight.shape[1]]
    codes = (weight / wide).clamp(-448, 448).to(torch.float8_e4m3fn)
    return {"weight": codes, "weight_scale_inv": scale}, (codes.double() * wide.double()).float()


def fp8_rows(weight: torch.Tensor, generator: torch.Generator) -> tuple[Tensors, torch.Tensor]:
    scale = (weight.abs().amax(1, keepdim=True) / 448).bfloat16()
    codes = (weight / scale).clamp(-448, 448).to(torch.float8_e4m3fn)
    return {"weight": codes, "weight_scale": scale}, (codes.double() * scale.double()).float()


def compressed(fmt: str, **weights: Any) -> dict[str, Any]:
    groups = {"group_0": {"targets": ["Linear"], "weights": weights}}
    return {"quant_method": "compressed-tensors", "format": fmt, "config_groups": groups, "ignore": ["lm_head"]}


GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": GROUP}
INT4 = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": GROUP}
# method -> its configuration, encoder, format of the experts of qwen3-moe (64 wide)
METHODS: dict[str, tuple[dict[str, Any], Encoder, str]] = {
    "fp8": ({"quant_method": "fp8", "weight_block_size": [128, 128]}, fp8, "F8_E4M3_G32"),
    "fp8-rows": (compressed("float-quantized", num_bits=8, type="float", strategy="channel"), fp8_rows, "F8_E4M3_G32"),
    "gptq": (GPTQ, gptq, "INT4_G32"),
    "gptq-act-order": (GPTQ | {"desc_act": True}, gptq_act_order, "INT4_G32_ORDERED"),
    "awq": ({"quant_method": "awq", "bits": 4, "group_size": GROUP, "version": "gemm"}, awq, "INT4_G32"),
    "compressed": (compressed("pack-quantized", **INT4), packed, "INT4_G32"),
}


def folders(name: str, folder: Path, tmp_path: Path, only: str = "_proj.weight") -> tuple[Path, Path]:
    """The model quantised, and with the values that this stands for as plain float32."""
    config, encode, _ = METHODS[name]
    generator = torch.Generator().manual_seed(4)
    plain = safetensors.torch.load_file(folder / "model.safetensors")
    stored: Tensors = {}
    for key, weight in list(plain.items()):
        # index heads' weights are in 32 bits on the hub, their other projections in 8
        projection = key.endswith(("_proj.weight", "indexer.wq_b.weight", "indexer.wk.weight"))
        left = "weights_proj" in key or only not in key or ("fp8" not in name and weight.shape[-1] % GROUP)
        if not projection or left:
            stored[key] = weight
            continue
        tensors, plain[key] = encode(weight, generator)
        stored |= {key.removesuffix("weight") + role: tensor.contiguous() for role, tensor in tensors.items()}
    made = []
    for part, tensors, method in (("quantised", stored, config), ("plain", plain, None)):
        path = tmp_path / part
        path.mkdir()
        settings = json.loads((folder / "config.json").read_text())
        (path / "config.json").write_text(json.dumps(settings | ({"quantization_config": method} if method else {})))
        safetensors.torch.save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
        made.append(path)
    return made[0], made[1]


def check(name: str, t: Tiny, tmp_path: Path, only: str = "_proj.weight") -> Runner:
    quantised, plain = folders(name, t.folder, tmp_path, only)
    model = AutoModelForCausalLM.from_pretrained(plain, dtype=torch.float32, attn_implementation="eager").eval()
    with torch.no_grad():
        expected = model(t.ids[None]).logits[0]
    assert (expected - t.logits).abs().max() > 1e-2, "quantising must show"
    with open_checkpoint(quantised) as checkpoint:
        run = Runner(checkpoint)
        torch.testing.assert_close(run(t.ids), expected, atol=TOLERANCE, rtol=0)
    return run


@pytest.mark.parametrize("method", METHODS)
def test_all_projections_quantised(method: str, tiny: Callable[[str], Tiny], tmp_path: Path) -> None:
    run = check(method, tiny("qwen3-moe"), tmp_path)
    specs = [node.spec for node in run.graph.walk() if isinstance(node.spec, ExpertsSpec)]
    # down has one group a row, where no order is needed
    assert {spec.gate_format for spec in specs} == {METHODS[method][2]}
    assert {spec.down_format for spec in specs} == {METHODS[method][2].removesuffix("_ORDERED")}


@pytest.mark.parametrize("method", METHODS)
def test_latent_attention_and_shared_experts(method: str, tiny: Callable[[str], Tiny], tmp_path: Path) -> None:
    check(method, tiny("v3"), tmp_path)


def test_index_heads_in_fp8_as_they_are_published(tiny: Callable[[str], Tiny], tmp_path: Path) -> None:
    run = check("fp8", tiny("v32"), tmp_path, "")
    assert run.graph.node("layers.1.attn.indexer.q").weights["weight"].sources[0].endswith("wq_b.weight")


@pytest.mark.parametrize("method", ["compressed", "gptq-act-order"])
def test_only_routed_experts_quantised(method: str, tiny: Callable[[str], Tiny], tmp_path: Path) -> None:
    run = check(method, tiny("kimi-k2"), tmp_path, ".experts.")
    assert run.graph.node("layers.1.ffn.shared.up").spec.formats() == ("F32",)
    assert run.graph.node("layers.1.ffn.experts").spec.gate_format == METHODS[method][2]


def native(fmt: str) -> bool:
    """Whether the host's kernels know a format."""
    module = pytest.importorskip("ktcore_cpu._native")
    return fmt in module.formats()


@pytest.mark.parametrize("method", ["gptq", "awq", "compressed", "fp8", "fp8-rows"])
def test_native_kernels_run_them(method: str, tiny: Callable[[str], Tiny], tmp_path: Path) -> None:
    needed = METHODS[method][2]
    if not native(needed):
        pytest.skip(f"no kernel for {needed} in this build")
    t = tiny("qwen3-moe")
    quantised, _ = folders(method, t.folder, tmp_path)
    with open_checkpoint(quantised) as checkpoint:
        expected = Runner(checkpoint)(t.ids)
    rules = tmp_path / "exact.yaml"
    rules.write_text(
        "version: 1\nrules:\n"
        "  - {name: moe, match: {op: moe}, use: [cpu.moe], options: {activations: f32}}\n"
        "  - {name: attention, match: {op: attention}, use: [cpu.attention], options: {activations: f32}}\n"
    )
    with ktcore.load(quantised, backend="cpu", rules=rules) as model:
        assert model.plan.choices["layers.1.ffn"].implementation.id == "cpu.moe"
        torch.testing.assert_close(model.logits(t.ids.tolist()), expected, atol=2e-3, rtol=0)


def test_native_kernels_refuse_columns_out_of_order(tiny: Callable[[str], Tiny], tmp_path: Path) -> None:
    """With a reason, and the reference, where a rule lists it, takes over."""
    native("F32")
    t = tiny("qwen3-moe")
    quantised, _ = folders("gptq-act-order", t.folder, tmp_path)
    rules = tmp_path / "strict.yaml"
    rules.write_text("version: 1\nrules:\n  - {name: moe, match: {op: moe}, use: [cpu.moe]}\n")
    with pytest.raises(PlanError, match=r"cpu\.moe: no native kernel for weight format .*INT4_G32_ORDERED"):
        ktcore.load(quantised, backend="cpu", rules=rules)


def test_columns_out_of_order_run_natively_once_quantised_anew(tiny: Callable[[str], Tiny], tmp_path: Path) -> None:
    native("F32")
    t = tiny("qwen3-moe")
    quantised, _ = folders("gptq-act-order", t.folder, tmp_path)
    with ktcore.load(quantised, backend="cpu", rules="reference") as model:
        expected = model.logits(t.ids.tolist())
    rules = tmp_path / "anew.yaml"
    rules.write_text(
        "version: 1\nrules:\n"
        "  - {name: moe, match: {op: moe}, use: [cpu.moe], options: {activations: f32, quantize: int8_g32}}\n"
        "  - {name: attention, match: {op: attention}, use: [cpu.attention],\n"
        "     options: {activations: f32, quantize: int8_g32}}\n"
    )
    with ktcore.load(quantised, backend="cpu", rules=rules) as model:
        assert model.plan.choices["layers.1.ffn"].implementation.id == "cpu.moe"
        got = model.logits(t.ids.tolist())
        assert 0 < max(model.quantization_error.values()) < 0.01
    # routers choose otherwise at near ties; columns out of place would leave nothing alike
    assert (got - expected).norm() < 0.1 * expected.norm()
