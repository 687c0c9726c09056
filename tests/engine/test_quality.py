"""The divergence against torch's own KL and by hand."""

from __future__ import annotations

import pytest
import torch

from ktcore.engine.quality import divergence


def test_equals_torch_kl_div() -> None:
    g = torch.Generator().manual_seed(0)
    full, other = torch.randn(150, 40, generator=g), torch.randn(150, 40, generator=g)
    p, q = full.double().log_softmax(-1), other.double().log_softmax(-1)
    expected = torch.nn.functional.kl_div(q, p, log_target=True, reduction="none").sum(-1)
    found = divergence(full, other)
    assert found.mean_kl == pytest.approx(expected.mean().item(), rel=1e-12)
    assert found.max_kl == pytest.approx(expected.max().item(), rel=1e-12)
    assert found.top1 == pytest.approx((full.argmax(-1) == other.argmax(-1)).double().mean().item())
    assert found.positions == 150


def test_nothing_between_a_model_and_itself() -> None:
    logits = torch.randn(10, 8)
    found = divergence(logits, logits)
    assert (found.mean_kl, found.top1) == (0.0, 1.0)


def test_different_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match="cannot be compared"):
        divergence(torch.zeros(3, 4), torch.zeros(2, 4))
