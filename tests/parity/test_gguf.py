"""The same weights written as GGUF, with all that converters change on the way, give transformers' logits."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from ktcore.graph import build_graph
from ktcore.ops import MLASpec
from ktcore.weights import open_checkpoint

from .conftest import Tiny
from .driver import Runner
from .gguf_writer import Layout, write_gguf
from .models import CONFIGS

pytestmark = pytest.mark.usefixtures("one_thread")
TOLERANCE = 1e-4
LATENT = ["glm4-lite", "mistral4", "v3", "kimi-k2", "moonlight", "v2-full", "v2-lite"]
# GGUF cannot express these: half pairing of latent attention, unusual renormalisation in Qwen2-MoE and Qwen3-MoE (its
# key is never written), sliding windows of these architectures, constants of LLaMA 4 and gpt-oss other than the
# released models', dense layers of Qwen3-Next; and Phi-3's files are not read
NOT_IN_GGUF = {"v3-half", "qwen3-moe-mixed", "qwen2-moe-mixed", "mistral-window", "qwen2-moe-window", "phi3"}
NOT_IN_GGUF |= {"llama4-scout", "llama4-maverick", "llama4-two", "gpt-oss", "gpt-oss-full", "qwen3-next-wide"}
# windows of dots1 neither, and of Solar-Open there is no kind of file
NOT_IN_GGUF |= {"dots1-window", "solar-open"}
# a number of experts a layer has no key
NOT_IN_GGUF |= {"hunyuan"}
# Kimi Linear whose delta attention has other heads than its latent one, and weights that are not renormalised
NOT_IN_GGUF |= {"kimi-linear-wide"}
# limits that llama.cpp takes for granted
NOT_IN_GGUF |= {"minimax-m3-limit"}


@pytest.mark.parametrize("name", [n for n in CONFIGS if n not in NOT_IN_GGUF])
def test_gguf_matches_transformers(name: str, tiny: Callable[[str], Tiny], tmp_path: Path) -> None:
    t = tiny(name)
    with open_checkpoint(write_gguf(t.model, tmp_path / "tiny.gguf")) as checkpoint:
        torch.testing.assert_close(Runner(checkpoint)(t.ids), t.logits, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("absorbed", [True, False])
@pytest.mark.parametrize("layout", ["split", "fused", "both"])
@pytest.mark.parametrize("name", ["v3", "v2-full", "v2-lite", "moonlight", "glm-dsa-shared"])
def test_every_layout_of_the_latent_up_projection_is_read(
    name: str, layout: Layout, absorbed: bool, tiny: Callable[[str], Tiny], tmp_path: Path
) -> None:
    t = tiny(name)
    with open_checkpoint(write_gguf(t.model, tmp_path / "tiny.gguf", layout)) as checkpoint:
        run = Runner(checkpoint, {MLASpec: {"absorbed": absorbed}})
        assert run.graph.node("layers.0.attn").spec.split_kv_b == (layout != "fused")
        torch.testing.assert_close(run(t.ids), t.logits, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("name", ["llama", "llama-bias", "qwen2", "glm4", "glm4-moe"])
def test_one_tensor_of_q_k_and_v_is_read_by_rows(name: str, tiny: Callable[[str], Tiny], tmp_path: Path) -> None:
    t = tiny(name)
    with open_checkpoint(write_gguf(t.model, tmp_path / "tiny.gguf", fuse_qkv=True)) as checkpoint:
        assert "blk.0.attn_q.weight" not in checkpoint.tensors
        torch.testing.assert_close(Runner(checkpoint)(t.ids), t.logits, atol=TOLERANCE, rtol=0)


def test_mixtral_files_with_a_tensor_an_expert_are_read(tiny: Callable[[str], Tiny], tmp_path: Path) -> None:
    t = tiny("mixtral")
    with open_checkpoint(write_gguf(t.model, tmp_path / "tiny.gguf", unstack_experts=True)) as checkpoint:
        assert "blk.1.ffn_down.7.weight" in checkpoint.tensors
        torch.testing.assert_close(Runner(checkpoint)(t.ids), t.logits, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("name", ["mixtral", "qwen3-moe", "v3"])
def test_one_tensor_of_the_experts_gate_and_up_is_read_by_halves(
    name: str, tiny: Callable[[str], Tiny], tmp_path: Path
) -> None:
    t = tiny(name)
    with open_checkpoint(write_gguf(t.model, tmp_path / "tiny.gguf", fuse_gate_up=True)) as checkpoint:
        assert not any("ffn_up_exps" in tensor for tensor in checkpoint.tensors)
        torch.testing.assert_close(Runner(checkpoint)(t.ids), t.logits, atol=TOLERANCE, rtol=0)


def test_limits_and_the_bound_of_glm5_next_may_be_absent(tiny: Callable[[str], Tiny], tmp_path: Path) -> None:
    """As in llama.cpp: shared experts have the limit of routed ones then, and without both keys there is none."""
    path = write_gguf(tiny("glm5-next").model, tmp_path / "tiny.gguf")
    with open_checkpoint(path) as checkpoint:
        config = dict(checkpoint.config)
        for key in ("swiglu_clamp_shexp", "swiglu_clamp_exp", "kda.gate_lower_bound"):
            del config[f"glm5-next.{key}"]
            checkpoint.config = config
            graph = build_graph(checkpoint)
            moe: Any = graph.node("layers.2.ffn").spec
            assert (moe.experts.clamped is None) == (moe.shared.clamped is None) == (key != "swiglu_clamp_shexp")
        delta: Any = graph.node("layers.0.attn").spec
    assert delta.lower_bound is None
