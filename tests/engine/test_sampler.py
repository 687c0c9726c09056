"""From a step's rows to tokens: what a row is asked for, guesses behind it, forms, and what is noted of each token."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from ktcore.engine.schedule.lookahead import PromptLookup
from ktcore.engine.schedule.sequence import Finish, Sequence
from ktcore.engine.step.sampler import FEW, draw
from ktcore.engine.step.scores import Scores
from ktcore.errors import RequestError
from ktcore.ops.sampling import SamplingParams, sample

VOCAB = 5000
GREEDY = SamplingParams(temperature=0)


class Distant(Scores):
    """As if its logits lay on a device; notes what was fetched of them."""

    on_host = False  # type: ignore[assignment]

    def __init__(self, logits: torch.Tensor) -> None:
        super().__init__(logits, lambda: None)
        object.__setattr__(self, "seen", [])

    def rows(self, which: Any = None) -> torch.Tensor:
        self.seen.append(("rows", list(which)))  # type: ignore[attr-defined]
        return super().rows(which)

    def likeliest(self) -> list[tuple[int, float]]:
        self.seen.append(("likeliest",))  # type: ignore[attr-defined]
        return super().likeliest()

    def candidates(self, which: Any, count: int) -> torch.Tensor:
        self.seen.append(("candidates", list(which), count))  # type: ignore[attr-defined]
        return super().candidates(which, count)


def rows(*likeliest: int) -> torch.Tensor:
    """Rows whose highest logit is at these ids."""
    logits = torch.randn(len(likeliest), VOCAB, generator=torch.Generator().manual_seed(0))
    logits[range(len(likeliest)), list(likeliest)] = 9.0
    return logits


@pytest.mark.parametrize(
    ("given", "fetched"),
    [
        ({"temperature": 0}, [("likeliest",)]),
        ({"temperature": 1, "top_k": 7}, [("candidates", [0], 7)]),
        ({"temperature": 1, "top_k": FEW}, [("candidates", [0], FEW)]),
        ({"temperature": 1, "top_k": FEW + 1}, [("rows", [0])]),
        ({"temperature": 1}, [("rows", [0])]),
        ({"temperature": 0, "repetition_penalty": 1.5}, [("rows", [0])]),
        ({"temperature": 0, "presence_penalty": 0.5}, [("rows", [0])]),
        ({"temperature": 0, "frequency_penalty": 0.5}, [("rows", [0])]),
        ({"temperature": 0, "logit_bias": {3: 1.0}}, [("rows", [0])]),
    ],
)
def test_no_more_is_fetched_than_an_answer_needs(given: dict[str, Any], fetched: list[Any]) -> None:
    scores = Distant(rows(17))
    sequence = Sequence([1], SamplingParams(**given, seed=1), 4)
    draw(sample, [sequence], scores)
    assert scores.seen == fetched  # type: ignore[attr-defined]
    assert len(sequence.tokens) == 2
    assert sequence.error is None


@pytest.mark.parametrize("more", [{"guide": lambda: Form(5, 6)}, {"top_logprobs": lambda: 0}])
def test_a_form_and_logprobs_need_the_whole_row(more: dict[str, Any]) -> None:
    scores = Distant(rows(17))
    draw(sample, [Sequence([1], GREEDY, 4, **{key: make() for key, make in more.items()})], scores)
    assert scores.seen == [("rows", [0])]  # type: ignore[attr-defined]


def test_each_answer_gets_its_own_row_whatever_the_others_need() -> None:
    scores = Distant(rows(11, 22, 33, 44))
    params = [SamplingParams(1.0, top_k=1), SamplingParams(0, repetition_penalty=1.1), GREEDY, SamplingParams(1.0, 1)]
    sequences = [Sequence([1], p, 4) for p in params]
    draw(sample, sequences, scores)
    assert [s.tokens for s in sequences] == [[1, 11], [1, 22], [1, 33], [1, 44]]


@pytest.mark.parametrize("kind", [Distant, lambda logits: Scores(logits, lambda: None)])
def test_guesses_are_taken_up_to_the_first_wrong_one(kind: Any) -> None:
    plain, right, half, wrong, last = (
        Sequence([1, 2], GREEDY, 9, cached=2, lookup=lookup)
        for lookup in (None, PromptLookup(6), PromptLookup(6), PromptLookup(6), None)
    )
    guesses = [(), (20, 30), (50, 51, 52), (71,), ()]
    logits = rows(10, 20, 30, 40, 50, 60, 99, 98, 70, 97, 80)
    draw(sample, [plain, right, half, wrong, last], kind(logits), guesses)
    assert [s.new_tokens for s in (plain, right, half, wrong, last)] == [[10], [20, 30, 40], [50, 60], [70], [80]]
    assert [s.cached for s in (plain, right, half, wrong, last)] == [2, 4, 3, 2, 2]
    for sequence, width in ((right, 4), (half, 2), (wrong, 1)):
        assert sequence.lookup is not None
        assert len(sequence.lookup.guess([*range(8), *range(3)], 9)) == width


def test_an_answer_that_ends_within_its_guesses_ends_there() -> None:
    sequence = Sequence([1], GREEDY, 9, stop_ids=frozenset({20}))
    draw(sample, [sequence], Scores(rows(10, 20, 30, 40), lambda: None), [(10, 20, 30)])
    assert sequence.new_tokens == [10, 20]
    assert sequence.finish is Finish.STOP
    short = Sequence([1], GREEDY, 2)
    draw(sample, [short], Scores(rows(10, 20, 30), lambda: None), [(10, 20)])
    assert (short.new_tokens, short.finish) == ([10, 20], Finish.LENGTH)


def test_logprobs_are_natural_logarithms_before_anything_is_changed() -> None:
    logits = rows(10, 20)
    plain = Sequence([1], SamplingParams(0, logit_bias={700: 50.0}), 4, top_logprobs=3)
    silent = Sequence([1], GREEDY, 4)
    draw(sample, [plain, silent], Scores(logits, lambda: None))
    (chosen,) = plain.chosen
    want = logits[0].double().log_softmax(-1)
    values, ids = want.topk(3)
    assert chosen.token == 700
    assert math.isclose(chosen.logprob, float(want[700]), abs_tol=1e-4)
    assert [i for i, _ in chosen.top] == ids.tolist()
    torch.testing.assert_close(torch.tensor([v for _, v in chosen.top]).double(), values, atol=1e-4, rtol=0)
    assert silent.chosen == []
    every = Sequence([1], GREEDY, 4, top_logprobs=VOCAB + 1)
    draw(sample, [every], Scores(logits[:1], lambda: None))
    assert len(every.chosen[0].top) == VOCAB
    none = Sequence([1], GREEDY, 4, top_logprobs=0)
    draw(sample, [none], Scores(logits[:1], lambda: None))
    assert (none.chosen[0].token, none.chosen[0].top) == (10, ())


class Form:
    """Allows one token after the other, and is whole after the last."""

    def __init__(self, *tokens: int) -> None:
        self.left, self.accepted = list(tokens), list[int]()

    def allowed(self, row: torch.Tensor) -> torch.Tensor:
        if not self.left:
            raise RequestError("the form cannot be followed")
        return row.masked_fill(torch.arange(len(row)) != self.left[0], float("-inf"))

    def accept(self, token: int) -> bool:
        self.accepted.append(token)
        self.left.pop(0)
        return not self.left


def test_a_form_decides_what_may_come_and_ends_the_answer() -> None:
    form = Form(5, 6)
    guided, free = Sequence([1], GREEDY, 9, guide=form), Sequence([1], GREEDY, 9)  # type: ignore[arg-type]
    for finish in (None, Finish.STOP):
        draw(sample, [guided, free], Scores(rows(10, 20), lambda: None))
        assert (guided.finish, free.finish) == (finish, None)
    assert (guided.new_tokens, form.accepted, free.new_tokens) == ([5, 6], [5, 6], [20, 20])


def test_the_token_that_stops_an_answer_is_no_part_of_its_form() -> None:
    form = Form(5, 6)
    sequence = Sequence([1], GREEDY, 9, guide=form, stop_ids=frozenset({5}))  # type: ignore[arg-type]
    draw(sample, [sequence], Scores(rows(10), lambda: None))
    assert (sequence.new_tokens, form.accepted, sequence.finish) == ([5], [], Finish.STOP)


def test_a_form_that_cannot_be_followed_ends_its_own_answer_alone() -> None:
    guided, free = Sequence([1], GREEDY, 9, guide=Form()), Sequence([1], GREEDY, 9)  # type: ignore[arg-type]
    draw(sample, [guided, free], Scores(rows(10, 20), lambda: None))
    assert isinstance(guided.error, RequestError)
    assert (guided.finish, guided.new_tokens, free.new_tokens) == (Finish.CANCELLED, [], [20])
