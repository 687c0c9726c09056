"""Checkpoints that would load but compute something else are refused, with the tensor or the setting named."""

from __future__ import annotations

from typing import Any

import pytest

from ktcore.errors import ArchitectureError
from ktcore.graph import build_graph

from . import test_gguf
from .headers import Headers
from .test_build import LLAMA_32, _llama


@pytest.mark.parametrize(
    "tensor",
    [
        "model.layers.3.self_attn.q_norm.weight",
        "model.layers.0.self_attn.sinks",
        "model.layers.15.post_feedforward_layernorm.weight",
        "vision_model.x",
        "mtp.fc.weight",
        "model.norm.bias",
    ],
)
def test_a_tensor_that_nothing_uses_is_named(tensor: str) -> None:
    with pytest.raises(ArchitectureError, match=f"nothing uses tensors {tensor}: architecture 'llama' has no such"):
        build_graph(Headers("hf", LLAMA_32, _llama() | {tensor: (64,)}))


def test_many_unused_tensors_are_counted() -> None:
    extra = {f"model.layers.{i}.self_attn.q_norm.weight": (64,) for i in range(16)}
    with pytest.raises(ArchitectureError, match=r"model\.layers\.3\.self_attn\.q_norm\.weight and 12 more"):
        build_graph(Headers("hf", LLAMA_32, _llama() | extra))


@pytest.mark.parametrize("tensor", ["model.layers.3.self_attn.rotary_emb.inv_freq", "model.layers.16.eh_proj.weight"])
def test_derived_values_and_prediction_layers_may_be_there(tensor: str) -> None:
    build_graph(Headers("hf", LLAMA_32, _llama() | {tensor: (64,)}))


@pytest.mark.parametrize("key", ["final_logit_softcapping", "logits_scaling", "residual_multiplier", "clip_qkv"])
@pytest.mark.parametrize(("value", "fine"), [(30.0, False), (None, True), (1.0, True), (0, True), (False, True)])
def test_settings_that_nobody_reads_are_refused(key: str, value: Any, fine: bool) -> None:
    checkpoint = Headers("hf", LLAMA_32 | {key: value}, _llama())
    if fine:
        build_graph(checkpoint)
        return
    with pytest.raises(ArchitectureError, match=f"{key} is 30.0, which architecture 'llama' is not known to do"):
        build_graph(checkpoint)


def test_gguf_settings_that_nobody_reads_are_refused() -> None:
    with pytest.raises(ArchitectureError, match=r"attention\.clamp_kqv is 8\.0"):
        build_graph(Headers("gguf", test_gguf.LLAMA | {"llama.attention.clamp_kqv": 8.0}, test_gguf._llama()))
