"""Sampling against transformers' own logits processors."""

from __future__ import annotations

import pytest
import torch
from transformers.generation.logits_process import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from ktcore.errors import RequestError
from ktcore.ops.sampling import SamplingParams, _candidates, sample


def _probabilities(logits: torch.Tensor, params: SamplingParams) -> torch.Tensor:
    probs, index = _candidates(logits / params.temperature, params)
    full = torch.zeros_like(logits)
    full[index if index is not None else slice(None)] = probs / probs.sum()
    return full


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5])
@pytest.mark.parametrize(
    ("top_k", "top_p", "min_p"), [(0, 1.0, 0.0), (7, 1.0, 0.0), (0, 0.8, 0.0), (0, 1.0, 0.1), (20, 0.9, 0.05)]
)
def test_distribution_equals_transformers_warpers(temperature: float, top_k: int, top_p: float, min_p: float) -> None:
    logits = torch.randn(100, generator=torch.Generator().manual_seed(top_k)) * 3
    chain = [TemperatureLogitsWarper(temperature)]
    chain += [TopKLogitsWarper(top_k)] if top_k else []
    chain += [TopPLogitsWarper(top_p)] if top_p < 1 else []
    chain += [MinPLogitsWarper(min_p)] if min_p else []
    scores = logits[None]
    for warper in chain:
        scores = warper(torch.zeros(1, 1, dtype=torch.long), scores)
    ours = _probabilities(logits, SamplingParams(temperature, top_k, top_p, min_p))
    torch.testing.assert_close(ours, scores.softmax(-1)[0], atol=1e-6, rtol=1e-5)


def test_repetition_penalty_equals_transformers() -> None:
    logits = torch.randn(50, generator=torch.Generator().manual_seed(0))
    seen = [3, 3, 7, 40]
    expected = RepetitionPenaltyLogitsProcessor(5.0)(torch.tensor([seen]), logits[None].clone())[0]
    params = SamplingParams(temperature=0, repetition_penalty=5.0)
    assert sample(logits, params, seen, None) == int(expected.argmax())
    best = int(logits.argmax())
    assert sample(logits, params, [best], None) == int(
        RepetitionPenaltyLogitsProcessor(5.0)(torch.tensor([[best]]), logits[None].clone()).argmax()
    )


def test_same_seed_draws_the_same_and_frequencies_follow_the_distribution() -> None:
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0])
    params = SamplingParams(temperature=1.0)
    draws = [sample(logits, params, [], torch.Generator().manual_seed(5)) for _ in range(3)]
    assert len(set(draws)) == 1
    generator = torch.Generator().manual_seed(0)
    counts = torch.bincount(torch.tensor([sample(logits, params, [], generator) for _ in range(4000)]), minlength=4)
    torch.testing.assert_close(counts / 4000, logits.softmax(-1), atol=0.03, rtol=0)


@pytest.mark.parametrize(
    "bad", [{"temperature": -1}, {"top_k": -1}, {"top_p": 0}, {"top_p": 1.5}, {"min_p": 1}, {"repetition_penalty": 0}]
)
def test_out_of_range_parameters_are_refused_by_name(bad: dict[str, float]) -> None:
    with pytest.raises(RequestError, match=next(iter(bad))):
        SamplingParams(**bad)  # type: ignore[arg-type]
