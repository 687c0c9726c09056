"""Sampling against transformers' own logits processors."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from transformers.generation.logits_process import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)

from ktcore.errors import LogitsError, RequestError
from ktcore.ops.sampling import SamplingParams, _candidates, _drawn, _likeliest, penalised, sample


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


@pytest.mark.parametrize("vocab", [100, 50_000])
@pytest.mark.parametrize("typical_p", [0.2, 0.9])
@pytest.mark.parametrize(("top_k", "top_p", "min_p"), [(0, 1.0, 0.0), (40, 1.0, 0.0), (0, 0.9, 0.01)])
def test_typical_equals_transformers_after_the_other_filters(
    vocab: int, typical_p: float, top_k: int, top_p: float, min_p: float
) -> None:
    logits = torch.randn(vocab, generator=torch.Generator().manual_seed(top_k)) * 3
    scores = logits[None]
    chain = [TopKLogitsWarper(top_k)] if top_k else []
    chain += [TopPLogitsWarper(top_p)] if top_p < 1 else []
    chain += [MinPLogitsWarper(min_p)] if min_p else []
    for warper in [*chain, TypicalLogitsWarper(typical_p)]:
        scores = warper(torch.zeros(1, 1, dtype=torch.long), scores)
    ours = _probabilities(logits, SamplingParams(1.0, top_k, top_p, min_p, typical_p=typical_p))
    torch.testing.assert_close(ours, scores.softmax(-1)[0], atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("seed", range(8))
def test_typical_mass_that_rounding_never_reaches_keeps_all(seed: int) -> None:
    """The sum of float32 ends a little below 1 for some of these, and the mass asked for is the next number."""
    logits = torch.randn(1000, generator=torch.Generator().manual_seed(seed))
    mass = 1 - 2.0**-53
    scores = TypicalLogitsWarper(mass)(torch.zeros(1, 1, dtype=torch.long), logits[None])[0]
    ours = _probabilities(logits, SamplingParams(1.0, typical_p=mass))
    torch.testing.assert_close(ours, scores.softmax(-1), atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("filters", [{"top_k": 700}, {"top_k": 7}, {"top_p": 0.05}, {"min_p": 1.0}, {"top_p": 0.9}])
def test_of_equal_logits_the_lower_ids_come_first(filters: dict[str, Any]) -> None:
    logits = torch.arange(6000).remainder(3).float()  # every third token is as likely as the others of its kind
    probs, index = _candidates(logits, SamplingParams(1.0, **filters))
    assert index is not None
    order = np.argsort(-logits.numpy(), kind="stable")[: len(probs)]
    np.testing.assert_array_equal(index.numpy(), order)


def test_the_likeliest_settle_it_up_to_the_last_of_them() -> None:
    """1024 equal tokens of 5000: without the last one they hold 1023 parts of 1024."""
    logits = torch.full((5000,), -200.0)
    logits[:1024] = 0.0
    for parts, few in ((1022.5, True), (1023.5, False)):
        params = SamplingParams(1.0, top_p=parts / 1024)
        assert len(_likeliest(logits, params)[0]) == (1024 if few else 5000)
        theirs = TopPLogitsWarper(parts / 1024)(torch.zeros(1, 1, dtype=torch.long), logits[None])[0]
        assert len(_candidates(logits, params)[0]) == int(theirs.isfinite().sum())


@pytest.mark.parametrize(("min_p", "few"), [(0.5, True), (1e-3, True), (1e-9, False)])
def test_a_least_probability_sorts_no_more_than_may_pass_it(min_p: float, few: bool) -> None:
    logits = torch.arange(5000).float() * -0.01  # number 1024 is e ** -10.24 as likely as the first
    params = SamplingParams(1.0, min_p=min_p)
    assert len(_likeliest(logits, params)[0]) == (1024 if few else 5000)
    kept = np.exp(-0.01 * np.arange(5000)) >= min_p
    assert len(_candidates(logits, params)[0]) == pytest.approx(int(kept.sum()), abs=1)


@pytest.mark.parametrize("spread", [0.01, 1.0, 6.0])
@pytest.mark.parametrize(("top_p", "min_p"), [(0.9, 0.0), (0.9999, 0.0), (1.0, 0.05), (1.0, 1e-9), (0.95, 1e-4)])
def test_large_vocabularies_are_filtered_alike(spread: float, top_p: float, min_p: float) -> None:
    """Whether the likeliest thousand settle it or all have to be sorted."""
    logits = torch.randn(50_000, generator=torch.Generator().manual_seed(1)) * spread
    scores = logits[None]
    for warper in [TopPLogitsWarper(top_p)] * (top_p < 1) + [MinPLogitsWarper(min_p)] * (min_p > 0):
        scores = warper(torch.zeros(1, 1, dtype=torch.long), scores)
    ours = _probabilities(logits, SamplingParams(1.0, 0, top_p, min_p))
    theirs = scores.softmax(-1)[0]
    # sums of 50 000 float32 in another order: the last few tokens kept may differ
    assert int((ours > 0).sum()) == pytest.approx(int((theirs > 0).sum()), rel=1e-2, abs=1)
    assert float((ours - theirs).abs().sum()) < 2e-3


def test_penalties_and_biases_follow_transformers_and_openai() -> None:
    logits = torch.randn(50, generator=torch.Generator().manual_seed(0)) * 2
    prompt, answer = [3, 3, 7, 40], [5, 7, 7, 7]
    bias = {5: -2.0, 8: 100.0, 3: 0.5}
    ids = torch.tensor([prompt + answer])
    expected = SequenceBiasLogitsProcessor([[[i], b] for i, b in bias.items()])(ids, logits[None].clone())
    expected = RepetitionPenaltyLogitsProcessor(1.3)(ids, expected)[0].double()
    for token in range(50):
        count = answer.count(token)
        # mu[j] - c[j] * alpha_frequency - float(c[j] > 0) * alpha_presence
        expected[token] -= count * 0.25 + float(count > 0) * -0.5
    params = SamplingParams(
        repetition_penalty=1.3, presence_penalty=-0.5, frequency_penalty=0.25, logit_bias=bias, temperature=0
    )
    before = logits.clone()
    found = penalised(logits, params, prompt + answer, len(prompt))
    torch.testing.assert_close(found.double(), expected, atol=1e-6, rtol=1e-6)
    assert torch.equal(logits, before)
    assert sample(logits, params, prompt + answer, None, len(prompt)) == 8


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


@pytest.mark.parametrize("filters", [{}, {"top_p": 0.99}, {"top_k": 3}])
def test_what_is_forbidden_is_never_drawn(filters: dict[str, Any]) -> None:
    logits = torch.full((1000,), float("-inf"))
    logits[[0, 500]] = torch.tensor([1.0, 1.5])
    generator = torch.Generator().manual_seed(1)
    draws = [sample(logits, SamplingParams(temperature=1, **filters), [], generator) for _ in range(500)]
    assert set(draws) == {0, 500}
    assert draws.count(500) / 500 == pytest.approx(torch.tensor(0.5).sigmoid().item(), abs=0.08)


@pytest.mark.parametrize("given", [{"top_p": 0}, {"min_p": 1}, {"top_k": 1}, {"top_p": 0, "top_k": 7}])
def test_the_narrowest_filters_leave_the_likeliest_token(given: dict[str, Any]) -> None:
    logits = torch.randn(9000, generator=torch.Generator().manual_seed(3))
    params = SamplingParams(temperature=1.5, **given)
    drawn = {sample(logits, params, [], torch.Generator().manual_seed(i)) for i in range(20)}
    assert drawn == {int(logits.argmax())}


def test_what_is_not_asked_for_changes_no_logit_and_drops_no_token() -> None:
    logits = torch.randn(50, generator=torch.Generator().manual_seed(0))
    assert penalised(logits, SamplingParams(), [3, 4], 1) is logits
    probs, index = _candidates(logits, SamplingParams())
    assert index is None
    torch.testing.assert_close(probs, logits.softmax(-1))


@pytest.mark.parametrize(
    "given", [{"typical_p": 1e-9}, {"typical_p": 1.0}, {"min_p": 0.0}, {"repetition_penalty": 0.1}]
)
def test_the_ends_of_what_is_allowed_are_taken(given: dict[str, Any]) -> None:
    logits = torch.randn(50, generator=torch.Generator().manual_seed(0))
    assert 0 <= sample(logits, SamplingParams(temperature=1, **given), [3], torch.Generator()) < 50


def test_minus_one_for_top_k_is_all() -> None:
    assert SamplingParams(top_k=-1) == SamplingParams(top_k=0)


@pytest.mark.parametrize("bad", [float("nan"), float("-inf")])
@pytest.mark.parametrize("filters", [{}, {"top_p": 0.9}, {"top_k": 3}, {"min_p": 0.1}, {"typical_p": 0.9}])
def test_logits_that_are_no_numbers_draw_nothing(bad: float, filters: dict[str, Any]) -> None:
    for temperature in (0, 1):
        with pytest.raises(LogitsError, match="not numbers"):
            sample(torch.full((9,), bad), SamplingParams(temperature, **filters), [], torch.Generator())


@pytest.mark.parametrize(
    "bad",
    [
        *({"temperature": -1}, {"top_k": -2}, {"top_p": -0.1}, {"top_p": 1.5}, {"min_p": 1.1}),
        *({"repetition_penalty": 0}, {"min_p": -0.1}),
        *({"typical_p": 0}, {"typical_p": 1.1}, {"presence_penalty": float("nan")}),
        *({"frequency_penalty": float("inf")}, {"logit_bias": {3: float("nan")}}),
    ],
)
def test_out_of_range_parameters_are_refused_by_name(bad: dict[str, Any]) -> None:
    with pytest.raises(RequestError, match=next(iter(bad))):
        SamplingParams(**bad)


@pytest.mark.parametrize("seed", [-(2**63), 2**63 - 1, None])
def test_a_seed_of_64_bits_is_taken(seed: int | None) -> None:
    assert SamplingParams(seed=seed).seed == seed


@pytest.mark.parametrize("seed", [-(2**63) - 1, 2**63])
def test_a_seed_of_more_bits_is_refused(seed: int) -> None:
    with pytest.raises(RequestError, match="64 bits"):
        SamplingParams(seed=seed)


def test_a_draw_of_nought_never_takes_what_has_no_probability(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "rand", lambda *size, **named: torch.zeros(1, dtype=torch.float64))
    logits = torch.tensor([float("-inf"), 1.0, 1.0])
    assert sample(logits, SamplingParams(temperature=1.0), [], torch.Generator()) == 1


def test_a_draw_is_as_fine_as_float64() -> None:
    """Of a million equals the one that a random number of 53 bits points to."""
    count = 1_000_000
    for seed in range(5):
        (place,) = torch.rand(1, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).tolist()
        drawn = _drawn(torch.ones(count), torch.Generator().manual_seed(seed))
        assert int(drawn) == int(place * count)


def test_parameters_can_be_kept_in_sets_whatever_their_biases() -> None:
    biased = SamplingParams(seed=3, logit_bias={1: 2.0})
    assert len({biased, replace(biased), replace(biased, logit_bias={1: 3.0}), replace(biased, top_k=2)}) == 3
