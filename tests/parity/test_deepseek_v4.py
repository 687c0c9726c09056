"""DeepSeek-V4: prompts longer than its real ratios, and both forms of its configuration."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, DeepseekV4Config

import ktcore
from ktcore.backend.reference.compressed import PagedEntries
from ktcore.errors import ArchitectureError, CheckpointError
from ktcore.graph import build_graph
from ktcore.graph.complete import left_out
from ktcore.ops import compressed
from ktcore.ops.streams import left
from ktcore.weights import open_checkpoint
from ktcore.weights.bare import BareCheckpoint

from . import deepseek_v4
from .conftest import Tiny
from .driver import Runner
from .models import CONFIGS
from .test_absent_keys import Config, Recorded, _changed, _facts, _graph

pytestmark = pytest.mark.usefixtures("one_thread")
LONG = 300  # the ratio of 128 closes twice


@pytest.fixture
def exact_rules(tmp_path: Path) -> Path:
    """Native operators with float32 activations and a float32 cache."""
    lines = "version: 1\nrules:\n"
    for op, more in {"linear": "", "moe": "", "experts": "", "compressed_attention": ", kv_dtype: f32"}.items():
        lines += f"  - name: exact {op}\n    match: {{op: {op}}}\n    use: [cpu.{op}, reference.{op}]\n"
        lines += f"    options: {{activations: f32{more}}}\n"
    path = tmp_path / "exact.yaml"
    path.write_text(lines)
    return path


@pytest.mark.parametrize("native", [False, True])
def test_prompts_longer_than_two_long_windows_match_transformers(
    native: bool, tiny: Callable[[str], Tiny], exact_rules: Path
) -> None:
    t = tiny("v4-released")
    ids = torch.randint(3, 256, (LONG,), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        want = t.model(ids[None]).logits[0]
    rules = exact_rules if native else "reference"
    with ktcore.load(t.folder, backend="cpu", rules=rules, context=512, threads=2) as model:
        used = {choice.implementation.id for choice in model.plan.choices.values()}
        assert native == ({"cpu.compressed_attention", "cpu.moe", "cpu.experts"} <= used)
        torch.testing.assert_close(model.logits(ids), want, atol=2e-4 if native else 1e-4, rtol=0)
        answer = model.generate(ids[None], max_new_tokens=32, temperature=0)
    # one by one the same as at once
    with torch.no_grad():
        likeliest = t.model(answer).logits[0].argmax(-1)
    assert torch.equal(answer[0, LONG:], likeliest[LONG - 1 : -1])


def test_layers_that_predict_further_tokens_are_left_out_by_name(tiny: Callable[[str], Tiny]) -> None:
    with open_checkpoint(tiny("v4").folder) as checkpoint:
        assert left_out(checkpoint, build_graph(checkpoint)) == {"layers that predict further tokens": 1}


def _completed(config: Config) -> Config:
    made = DeepseekV4Config(**json.loads(json.dumps(config)))
    return json.loads(json.dumps(made.to_dict()))


def _hub(name: str = "v4") -> Config:
    config = deepseek_v4.hub_config(CONFIGS[name]())  # type: ignore[arg-type]
    return json.loads(json.dumps(config))


@pytest.mark.parametrize("name", ["v4", "v4-released"])
def test_the_hubs_form_and_that_of_transformers_are_the_same_model(name: str) -> None:
    assert _facts(_graph(_hub(name))) == _facts(_graph(_completed(_hub(name))))


def test_a_missing_key_is_the_class_default_or_an_error() -> None:
    wrong = []
    for key, what, changed in _changed(_hub()):
        try:
            completed: Config | None = _completed(changed)
        except Exception:
            completed = None
        Recorded.asked = set()
        try:
            found = _facts(_graph(Recorded(changed)))
        except (ArchitectureError, CheckpointError) as error:
            if key not in str(error):
                wrong.append(f"{key} {what}: the error does not name it: {error}")
            continue
        if completed is None:
            if key in Recorded.asked:
                wrong.append(f"{key} {what}: transformers refuses it, a graph came out")
        elif found != (wanted := _facts(_graph(completed))):
            wrong.append(
                f"{key} {what}: {next(pair for pair in zip(found, wanted, strict=True) if pair[0] != pair[1])}"
            )
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"scoring_func": "sigmoid"}, "scoring_func"),
        ({"norm_topk_prob": False}, "norm_topk_prob"),
        ({"num_key_value_heads": 2}, "num_key_value_heads"),
        ({"n_shared_experts": 2}, "n_shared_experts"),
        ({"compress_ratios": [0, 0, 4, 64, 4]}, "compress_ratios holds 64"),
        ({"compress_ratios": [0, 4]}, "compress_ratios"),
        ({"layer_types": ["full_attention"] * 5}, "layer_types"),
        ({"mlp_layer_types": ["dense"] * 5}, "mlp_layer_types"),
        ({"compress_rates": {"compressed_sparse_attention": 4}, "compress_rate_hca": None}, "compress_rates"),
        ({"o_groups": 3}, "o_groups"),
        ({"swiglu_limit": 0.0}, "swiglu_limit"),
        ({"rope_scaling": {"type": "ntk", "factor": 2.0}}, "ntk"),
        ({"qk_rope_head_dim": 15}, "rotary"),
    ],
)
def test_what_no_release_has_is_refused_by_its_key(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ArchitectureError, match=words):
        build_graph(BareCheckpoint(Path("config.json"), _hub() | changes))


ATTENTION = "ktcore.backend.compressed"
WINDOWS = "ktcore.backend.open_windows"
STREAMS = "ktcore.backend.reference.streams"
QUIRKS: dict[str, tuple[str, Callable[..., Any]]] = {
    "queries are divided by their own size": (f"{ATTENTION}.rms_norm", lambda q, weight, eps: q),
    "what was attended to is rotated back": (f"{ATTENTION}.mirrored_pairs", lambda x, pairing: x),
    "sinks": (f"{ATTENTION}.merged", lambda parts, sinks: compressed.merged(parts, sinks - 100)),
    "first halves count for the window behind": (f"{WINDOWS}.overlapping", lambda x, dim, nothing: _own_window(x, dim)),
    "first halves": (f"{WINDOWS}.overlapping", lambda x, dim, nothing: x[..., dim:]),
    "gates weigh channels by themselves": (f"{WINDOWS}.pooled", lambda v, g: compressed.pooled(v, g.mean(-1, True))),
    "streams are mixed by the transpose": (f"{STREAMS}.left", lambda x, y, post, mix: left(x, y, post, mix.mT)),
}


def _own_window(rows: torch.Tensor, dim: int) -> torch.Tensor:
    return torch.cat((rows[..., :dim], rows[..., dim:]), 1)


@pytest.mark.parametrize("quirk", QUIRKS)
def test_parity_sees(quirk: str, tiny: Callable[[str], Tiny], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(*QUIRKS[quirk])
    _is_far_off(tiny("v4"))


@pytest.mark.parametrize("early", [True, False])
def test_parity_sees_when_entries_are_shown(
    early: bool, tiny: Callable[[str], Tiny], monkeypatch: pytest.MonkeyPatch
) -> None:
    right = PagedEntries._sequences

    def wrong(self: Any, step: Any) -> Any:
        for span, rows, visible in right(self, step):
            yield span, rows, (visible + 1).clamp(max=len(rows)) if early else (visible - 1).clamp(min=0)

    monkeypatch.setattr(PagedEntries, "_sequences", wrong)
    _is_far_off(tiny("v4"))


def _is_far_off(t: Tiny) -> None:
    with open_checkpoint(t.folder) as checkpoint:
        logits = Runner(checkpoint)(t.ids)
    assert (logits - t.logits).abs().max() > 1e-3


FP4 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
EXPONENT = 122  # of every scale, which is 2^-5
EXPERTS = re.compile(r"\.experts\.\d+\.w\d\.weight$")
IN_FP8 = re.compile(r"\.(wq_a|wq_b|wkv|wo_a|wo_b)\.weight$|\.shared_experts\.w\d\.weight$")


def _in_fp4(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Codes int8 [out, in / 2], earlier ones low; exponents [out, in / 32]; the values that these are."""
    scale = 2.0 ** (EXPONENT - 127)
    codes = ((weight.abs() / scale)[..., None] - FP4).abs().argmin(-1)
    values = FP4[codes] * weight.sign() * scale
    codes = codes + 8 * (weight < 0)
    packed = (codes[:, 0::2] + 16 * codes[:, 1::2]).to(torch.uint8).view(torch.int8)
    scales = torch.full((len(weight), weight.shape[1] // 32), EXPONENT, dtype=torch.uint8)
    return packed, scales.view(torch.float8_e8m0fnu), values


def _in_fp8(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    scale = 2.0 ** (EXPONENT - 127)
    codes = (weight / scale).to(torch.float8_e4m3fn)
    blocks = [-(-n // 128) for n in weight.shape]
    scales = torch.full(blocks, EXPONENT, dtype=torch.uint8)
    return codes, scales.view(torch.float8_e8m0fnu), codes.float() * scale


def test_the_hubs_weights_of_four_and_eight_bits_give_the_values_that_they_hold(tmp_path: Path) -> None:
    torch.manual_seed(5)
    model = AutoModelForCausalLM.from_config(deepseek_v4.config(moe_intermediate_size=64), dtype=torch.float32).eval()
    with torch.no_grad():
        deepseek_v4.fill(model)
    stored: dict[str, torch.Tensor] = {}
    plain: dict[str, torch.Tensor] = {}
    for name, value in deepseek_v4.hub_tensors(model):
        made = _in_fp4(value) if EXPERTS.search(name) else _in_fp8(value) if IN_FP8.search(name) else None
        # compressors' projections stay as they are
        if made is None or ".compressor." in name:
            stored[name] = plain[name] = value.clone()
        else:
            stored[name], stored[name.removesuffix("weight") + "scale"], plain[name] = made
    config = deepseek_v4.hub_config(model.config)  # type: ignore[arg-type]
    section = {"quant_method": "fp8", "fmt": "e4m3", "scale_fmt": "ue8m0", "weight_block_size": [128, 128]}
    logits = []
    ids = torch.randint(3, 256, (96,), generator=torch.Generator().manual_seed(1))
    for folder, tensors, more in (("packed", stored, {"quantization_config": section}), ("plain", plain, {})):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "config.json").write_text(json.dumps(config | {"expert_dtype": "fp4"} | more))
        save_file(tensors, tmp_path / folder / "model.safetensors")
        with open_checkpoint(tmp_path / folder) as checkpoint:
            run = Runner(checkpoint)
            logits.append(run(ids))
            packed = {"MXFP4"} if more else {"F32"}
            assert set(run.graph.node("layers.2.ffn.experts").spec.formats()) == packed
    torch.testing.assert_close(logits[0], logits[1], atol=1e-5, rtol=0)
