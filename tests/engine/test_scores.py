"""Tokens drawn from what a device hands over are those that whole rows would give."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from ktcore.engine.schedule.sequence import Finish, Sequence
from ktcore.engine.step.sampler import draw
from ktcore.engine.step.scores import Scores, from_keys, order_keys
from ktcore.errors import LogitsError
from ktcore.ops.sampling import SamplingParams, sample

VOCAB = 3000


class _Distant(Scores):
    """As if its logits lay on a device; notes whole rows that were fetched."""

    on_host = False  # type: ignore[assignment]
    fetched: list[int] = []  # noqa: RUF012

    def rows(self, which: list[int] | None = None) -> torch.Tensor:  # type: ignore[override]
        self.fetched.extend(which or range(len(self.logits)))
        return super().rows(which)


def _logits(rows: int, seed: int) -> torch.Tensor:
    """Many equals, as bfloat16 gives them."""
    return (torch.randn(rows, VOCAB, generator=torch.Generator().manual_seed(seed)) * 3).bfloat16().float()


def _params(seed: int) -> list[SamplingParams]:
    return [
        SamplingParams(temperature=0),
        SamplingParams(temperature=0.7, top_k=40, seed=seed),
        SamplingParams(temperature=1.3, top_k=1000, top_p=0.9, min_p=0.01, seed=seed),
        SamplingParams(temperature=0.8, seed=seed),
        SamplingParams(temperature=0, repetition_penalty=1.1),
    ]


@pytest.mark.parametrize("seed", range(8))
def test_the_same_tokens_and_few_rows(seed: int) -> None:
    logits = _logits(5, seed)
    near, far = ([Sequence([3, 4], p, 8) for p in _params(seed)] for _ in range(2))
    draw(sample, near, Scores(logits, lambda: None))
    scores = _Distant(logits, lambda: None)
    scores.fetched.clear()
    draw(sample, far, scores)
    assert [s.tokens for s in near] == [s.tokens for s in far]
    assert scores.fetched == [3, 4]


def test_a_batch_of_greedy_answers_fetches_ids_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    logits = _logits(3, 1)
    logits[1, [700, 900]] = logits[1].max() + 1
    scores = _Distant(logits, lambda: None)
    scores.fetched.clear()
    answers = [Sequence([1], SamplingParams(temperature=0), 4) for _ in range(3)]
    draw(sample, answers, scores)
    assert scores.fetched == []
    assert [s.tokens[-1] for s in answers] == [int(row.argmax()) for row in logits]
    assert answers[1].tokens[-1] == 700


def test_keys_order_as_numbers_and_come_back() -> None:
    row = torch.tensor([[0.0, -0.0, 1.5, 1.5, -3.0, float("-inf"), float("inf"), 1e-40, -1e-40]])
    values, ids = from_keys(order_keys(row).sort(descending=True).values)
    assert ids[0].tolist() == [6, 2, 3, 7, 0, 1, 8, 4, 5]
    assert torch.equal(values[0], row[0][ids[0]])
    zeros = torch.tensor([[-0.0, 0.0, -0.0]])  # equals, so in the order of their ids
    assert from_keys(order_keys(zeros).sort(descending=True).values)[1].tolist() == [[0, 1, 2]]


def test_errors_of_the_step_come_with_its_tokens() -> None:
    def fail() -> None:
        raise RuntimeError("an expert failed")

    for params in _params(seed=1):
        answer = Sequence([1], params, 4)
        for kind in (Scores, _Distant):
            with pytest.raises(RuntimeError, match="an expert failed"):
                draw(sample, [answer], kind(_logits(1, 0), fail))
        assert answer.tokens == [1]


def test_logits_that_are_no_numbers_are_an_error_from_candidates_too() -> None:
    logits = _logits(1, 0)
    logits[0, 5] = float("nan")
    answer = Sequence([1], SamplingParams(top_k=5, seed=1), 4)
    draw(sample, [answer], _Distant(logits, lambda: None))
    assert isinstance(answer.error, LogitsError)


@pytest.mark.parametrize("bad", [float("nan"), -float("nan"), float("inf")])
@pytest.mark.parametrize("near", [True, False], ids=["host", "device"])
@pytest.mark.parametrize(
    "given",
    [
        {"temperature": 0},
        {"temperature": 0, "logit_bias": {3: 1.0}},
        {"temperature": 1, "seed": 1},
        {"temperature": 1, "seed": 1, "top_k": 5},
        {"temperature": 1, "seed": 1, "top_p": 0.0},
    ],
    ids=str,
)
def test_a_row_of_no_numbers_ends_its_own_answer_alone(near: bool, bad: float, given: dict[str, Any]) -> None:
    logits = _logits(3, 2)
    logits[1, 700] = torch.copysign(torch.tensor(bad), torch.tensor(bad))
    answers = [Sequence([1], SamplingParams(**given), 4, top_logprobs=2 if near else None) for _ in range(3)]
    alone = [Sequence([1], SamplingParams(**given), 4) for _ in range(3)]
    draw(sample, answers, (Scores if near else _Distant)(logits, lambda: None))
    draw(sample, alone[::2], Scores(logits[::2], lambda: None))
    assert isinstance(answers[1].error, LogitsError)
    assert answers[1].tokens == [1]
    assert answers[1].finish is Finish.CANCELLED
    assert not answers[1].chosen
    assert [s.tokens for s in answers[::2]] == [s.tokens for s in alone[::2]]
    assert [s.error for s in answers[::2]] == [None, None]


def test_a_form_does_not_hide_what_is_no_number() -> None:
    class _Forbids:
        def allowed(self, row: torch.Tensor) -> torch.Tensor:
            return row.masked_fill(torch.arange(VOCAB) != 3, float("-inf"))

        def accept(self, token: int) -> bool:
            return False

    logits = _logits(1, 2)
    logits[0, 700] = float("nan")
    answer = Sequence([1], SamplingParams(temperature=0), 4, guide=_Forbids())  # type: ignore[arg-type]
    draw(sample, [answer], Scores(logits, lambda: None))
    assert isinstance(answer.error, LogitsError)


def test_guesses_behind_a_row_of_no_numbers_are_not_taken() -> None:
    logits = _logits(3, 2)
    first = int(logits[0].argmax())
    logits[1, 700] = float("nan")
    answer = Sequence([1], SamplingParams(temperature=0), 9)
    draw(sample, [answer], Scores(logits, lambda: None), [(first, int(logits[2].argmax()))])
    assert answer.tokens == [1, first]
    assert isinstance(answer.error, LogitsError)


def test_equal_logits_are_ranked_by_id() -> None:
    logits = torch.zeros(VOCAB)
    drawn = {
        sample(logits, SamplingParams(1.0, top_k=3, seed=1), [], torch.Generator().manual_seed(i)) for i in range(64)
    }
    assert drawn == {0, 1, 2}
