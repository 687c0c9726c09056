"""Norm, linear, embedding and MLP against transformers and torch."""

from __future__ import annotations

import pytest
import torch
from transformers.activations import ACT2FN
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from ktcore.ops.embedding import embedding
from ktcore.ops.linear import linear
from ktcore.ops.mlp import gated
from ktcore.ops.norm import rms_norm


@pytest.mark.parametrize("eps", [1e-6, 1e-5, 1e-1])
@pytest.mark.parametrize("shape", [(1, 576), (7, 3, 128)])
def test_rms_norm_matches_llama(shape: tuple[int, ...], eps: float) -> None:
    x = torch.randn(shape)
    module = LlamaRMSNorm(shape[-1], eps)
    module.weight.data = torch.randn(shape[-1])
    torch.testing.assert_close(rms_norm(x, module.weight.data, eps), module(x).detach(), atol=1e-6, rtol=1e-6)


def test_rms_norm_without_weight() -> None:
    x = torch.randn(5, 64)
    torch.testing.assert_close(rms_norm(x, None, 1e-6), torch.nn.functional.rms_norm(x, (64,), eps=1e-6))


@pytest.mark.parametrize("bias", [True, False])
def test_linear_matches_torch(bias: bool) -> None:
    module = torch.nn.Linear(48, 20, bias=bias)
    x = torch.randn(3, 48)
    ours = linear(x, module.weight, module.bias)
    torch.testing.assert_close(ours.detach(), module(x).detach(), atol=1e-6, rtol=1e-6)


def test_embedding_takes_rows() -> None:
    table = torch.randn(11, 4)
    ids = torch.tensor([10, 0, 10, 3])
    torch.testing.assert_close(embedding(ids, table), torch.nn.functional.embedding(ids, table))


@pytest.mark.parametrize(("ours", "theirs"), [("silu", "silu"), ("relu", "relu"), ("gelu_tanh", "gelu_pytorch_tanh")])
def test_gated_activations_match_transformers(ours: str, theirs: str) -> None:
    gate, up = torch.randn(2, 9, 33)
    torch.testing.assert_close(gated(gate, up, ours), ACT2FN[theirs](gate) * up, atol=1e-6, rtol=1e-5)
