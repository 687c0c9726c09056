"""Whatever a configuration says, a graph comes out or an error that a user can read: never another exception."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from ktcore.errors import KtcoreError
from ktcore.graph import build_graph
from ktcore.weights.bare import BareCheckpoint

from . import test_build, test_gguf
from .headers import Headers

JUNK: list[Any] = [
    None,
    0,
    -1,
    1,
    3,
    2**40,
    0.0,
    -1.5,
    float("nan"),
    float("inf"),
    True,
    "",
    "7",
    "yarn",
    [],
    [1],
    {},
    {"a": 1},
]
ROPE_KEYS = [
    "rope_type",
    "type",
    "factor",
    "original_max_position_embeddings",
    "low_freq_factor",
    "beta_fast",
    "mscale_all_dim",
    "rope_theta",
    "partial_rotary_factor",
    "attention_factor",
]

SMALL_DEEPSEEK = test_build.DEEPSEEK_V3 | {"num_hidden_layers": 4, "n_routed_experts": 16}
HF = {
    "llama": (test_build.LLAMA_32, test_build._llama()),
    "deepseek": (SMALL_DEEPSEEK, test_build._deepseek(SMALL_DEEPSEEK)),
    "qwen3-moe": (
        test_build.QWEN3_MOE | {"num_hidden_layers": 1},
        {n: s for n, s in test_build._qwen3_moe().items() if not n.startswith("model.layers.") or ".layers.0." in n},
    ),
}
GGUF = {"llama": (test_gguf.LLAMA, test_gguf._llama()), "deepseek": (test_gguf.DEEPSEEK, test_gguf._deepseek())}
GGUF_KEYS = [
    "rope.freq_base",
    "rope.scaling.type",
    "rope.scaling.factor",
    "rope.scaling.original_context_length",
    "rope.scaling.yarn_log_multiplier",
    "rope.scaling.attn_factor",
    "expert_gating_func",
    "expert_group_count",
    "expert_group_used_count",
    "expert_weights_scale",
    "nextn_predict_layers",
    "attention.q_lora_rank",
]


CONFIGS = Path(__file__).parents[1] / "data" / "configs"
SMALL = {"num_hidden_layers": 2, "n_routed_experts": 16, "num_experts": 16, "num_local_experts": 16}
SMALL |= {"full_attention_interval": 2}  # of two layers one has attention


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.json")), ids=lambda path: path.stem)
def test_every_key_of_a_bare_config_json_may_hold_junk(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # 2**40 experts are given up after so many tensors, whatever the number; two layers have some 200
    monkeypatch.setattr("ktcore.weights.bare.MAX_TENSORS", 2000)
    whole = json.loads(path.read_text())
    config = whole.get("text_config", whole)
    config |= {key: value for key, value in SMALL.items() if key in config}
    for key in [*config, "quantization_config"]:
        for junk in JUNK:
            with contextlib.suppress(KtcoreError):
                build_graph(BareCheckpoint(path, config | {key: junk}))


def _survives(kind: str, config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> None:
    with contextlib.suppress(KtcoreError):
        build_graph(Headers(kind, config, shapes))


@pytest.mark.parametrize("name", HF)
def test_every_key_of_config_json_may_hold_junk(name: str) -> None:
    config, shapes = HF[name]
    extra = ["rope_parameters", "sliding_window", "layer_types", "quantization_config", "hidden_act", "scoring_func"]
    for key in [*config, *extra]:
        for junk in JUNK:
            _survives("hf", config | {key: junk}, shapes)


@pytest.mark.parametrize("kind", ["linear", "llama3", "yarn"])
@pytest.mark.parametrize("key", ROPE_KEYS)
def test_every_rope_parameter_may_hold_junk(kind: str, key: str) -> None:
    config, shapes = HF["deepseek"]
    rope = config["rope_scaling"] | {"rope_type": kind, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    for junk in JUNK:
        _survives("hf", config | {"rope_scaling": rope | {key: junk}}, shapes)


@pytest.mark.parametrize("name", GGUF)
def test_every_key_of_gguf_may_hold_junk(name: str) -> None:
    config, shapes = GGUF[name]
    prefix = config["general.architecture"]
    yarn = {f"{prefix}.rope.scaling.type": "yarn", f"{prefix}.rope.scaling.factor": 4.0}
    for key in [*config, *(f"{prefix}.{k}" for k in GGUF_KEYS)]:
        for junk in JUNK:
            _survives("gguf", config | {key: junk}, shapes)
            _survives("gguf", config | yarn | {key: junk}, shapes)
