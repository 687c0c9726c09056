"""The step loop over a model whose answers are known by heart."""

from __future__ import annotations

import pytest
import torch

from ktcore.engine.schedule.lookahead import PromptLookup
from ktcore.engine.schedule.pooling import LAST, MEAN, Pool
from ktcore.engine.schedule.sequence import Finish, Sequence
from ktcore.engine.step.engine import Engine
from ktcore.errors import ContextError, LogitsError, RequestError
from ktcore.ops.sampling import SamplingParams

from .toy import VOCAB, KeptStates, NoDevices, Pages, States, answer, engine, run, toy

GREEDY = SamplingParams(temperature=0)


def asked(prompt: list[int], new: int = 5, **more: object) -> Sequence:
    return Sequence(list(prompt), GREEDY, new, **more)  # type: ignore[arg-type]


@pytest.mark.parametrize("part", [Pages, States])
@pytest.mark.parametrize("chunk", [3, 64])
def test_answers_are_those_of_each_prompt_alone(part: type, chunk: int) -> None:
    prompts = [[i + 1, 7 * i, 90, *range(3 * i)] for i in range(6)]
    sequences = [asked(p, new=4 + i) for i, p in enumerate(prompts)]
    made = engine(part(), chunk=chunk, state_slots=4)
    run(made, *sequences)
    assert [s.new_tokens for s in sequences] == [answer(p, 4 + i) for i, p in enumerate(prompts)]
    assert {s.finish for s in sequences} == {Finish.LENGTH}
    assert made.scheduler.pages.free == made.scheduler.pages.total == 64
    assert made.step() is False


def test_a_stop_token_ends_an_answer_and_is_kept() -> None:
    sequence = asked([1, 2], new=20, stop_ids=frozenset({answer([1, 2], 4)[3]}))
    run(engine(), sequence)
    assert sequence.new_tokens == answer([1, 2], 4)
    assert sequence.finish is Finish.STOP


def test_pages_are_rounded_up_to_hold_the_context() -> None:
    assert engine(context=9, page_size=4).scheduler.pages.total == 3
    assert engine(context=8, page_size=4).scheduler.pages.total == 2


def test_a_prompt_has_to_leave_room_for_an_answer_if_one_is_wanted() -> None:
    made = engine(context=8)
    with pytest.raises(RequestError, match="the prompt is empty"):
        made.add(asked([]))
    for prompt, new in ((8, 1), (8, 5), (9, 0), (9, 1)):
        with pytest.raises(ContextError, match=f"has {prompt} tokens, the context holds 8"):
            made.add(asked([1] * prompt, new, all_logits=new == 0))
    whole = asked([1] * 8, 0, all_logits=True)
    run(made, whole)
    assert torch.cat(whole.logits).argmax(-1).tolist() == list(range(1, 9))
    last = asked([1] * 7, 1)
    run(made, last)
    assert last.new_tokens == [7]


def test_an_answer_ends_where_the_context_does() -> None:
    sequence = asked([1, 2, 3], new=100)
    run(engine(context=8), sequence)
    assert sequence.new_tokens == answer([1, 2, 3], 5)
    assert sequence.finish is Finish.LENGTH


def test_no_answer_at_all_takes_no_step() -> None:
    sequence = asked([1, 2], new=0)
    made = engine()
    made.add(sequence)
    assert sequence.finish is Finish.LENGTH
    assert made.step() is False
    assert sequence.new_tokens == []


@pytest.mark.parametrize("chunk", [2, 64])
@pytest.mark.parametrize("kind", [MEAN, LAST])
def test_pooled_states_are_one_vector_of_unit_length(kind: str, chunk: int) -> None:
    sequence = asked([1, 2, 3, 4, 5], 0, all_logits=True, pool=Pool(kind))
    run(engine(chunk=chunk), sequence)
    states = torch.eye(VOCAB)[[1, 3, 6, 10, 15]]
    want = torch.nn.functional.normalize(states[-1] if kind == LAST else states.mean(0), dim=0)
    assert sequence.pool is not None
    torch.testing.assert_close(sequence.pool.vector(), want)
    assert sequence.logits == []
    assert (sequence.finish, sequence.error) == (Finish.LENGTH, None)


def test_pooled_states_that_are_no_numbers_are_an_error() -> None:
    made = engine()
    object.__setattr__(made.model, "norm", lambda x: x * float("nan"))
    sequence = asked([1, 2], 0, all_logits=True, pool=Pool())
    run(made, sequence)
    assert isinstance(sequence.error, LogitsError)
    assert sequence.finish is Finish.CANCELLED


def test_a_pool_without_states_has_no_vector() -> None:
    assert Pool().finite
    with pytest.raises(ValueError, match="no states were added"):
        Pool().vector()


@pytest.mark.parametrize("pooled", [True, False])
def test_what_host_experts_raised_comes_with_the_steps_result(pooled: bool) -> None:
    made = Engine(toy(devices=NoDevices(MemoryError("an expert failed"))), 64, 4)
    made.add(asked([1, 2], 0, all_logits=True, pool=Pool()) if pooled else asked([1, 2]))
    with pytest.raises(MemoryError, match="an expert failed"):
        made.step()


class Pacing:
    """Lets prompts have so many tokens, and notes what is told of each step."""

    def __init__(self, limit: int) -> None:
        self.limit, self.asked, self.told = limit, list[int](), list[tuple[int, int]]()

    def most(self, decoding: int) -> int | None:
        self.asked.append(decoding)
        return self.limit if decoding else None

    def note(self, decoding: int, prompt: int, seconds: float) -> None:
        assert seconds > 0
        self.told.append((decoding, prompt))


def test_the_pace_is_asked_before_each_step_and_told_after_it() -> None:
    made = engine()
    pace = made.pace = Pacing(2)  # type: ignore[assignment]
    first, second = asked([1, 2, 3], 4), asked([4] * 5, 1)
    made.add(first)
    made.step()
    run(made, second)
    assert first.new_tokens == answer([1, 2, 3], 4)
    assert second.new_tokens == answer([4] * 5, 1)
    assert pace.told == [(0, 3), (1, 2), (1, 2), (2, 0)]  # a prompt's last token runs as a drawn one does
    assert pace.asked == [0, 1, 1, 2, 0]


@pytest.mark.parametrize(
    ("prompt", "new", "steps"),
    [
        ([1, 1, 2, 4, 8, 16, 32, 64], 12, 4),  # goes on with 1 and 2, then two times with four guesses and one more
        ([0] * 9, 8, 5),  # after a run of one token the next one is guessed
        ([1, 10, 20, 105, 1], 8, 7),  # draws 10, after which 20 is guessed rightly and 105 wrongly
        ([1, 10, 50, 75, 1], 8, 8),  # draws 10, after which 50 is guessed wrongly
        ([1, 2, 3], 8, 8),  # nothing is guessed
    ],
)
def test_guesses_change_no_answer_and_right_ones_save_steps(prompt: list[int], new: int, steps: int) -> None:
    made, sequence, seen = engine(), asked(prompt, new, lookup=PromptLookup(4)), 0
    made.add(sequence)
    while made.step():
        seen += 1
    assert (sequence.new_tokens, seen) == (answer(prompt, new), steps)
    assert made.scheduler.pages.free == made.scheduler.pages.total


@pytest.mark.parametrize(("prompt", "context", "steps"), [(11, 32, 3), (11, 40, 2), (9, 24, 2)])
def test_no_guess_takes_a_page_that_another_answer_may_need(prompt: int, context: int, steps: int) -> None:
    made, seen = engine(context=context), 0  # pages to spare for nobody, for both, or none that are needed
    sequences = [asked([0] * prompt, 3, lookup=PromptLookup(4)) for _ in range(2)]
    for sequence in sequences:
        made.add(sequence)
    while made.step():
        seen += 1
    assert seen == steps
    assert [s.new_tokens for s in sequences] == [[0] * 3] * 2


@pytest.mark.parametrize("part", [States, KeptStates])
@pytest.mark.parametrize(
    ("prompt", "new", "steps"),
    [
        ([0] * 9, 8, 5),  # right guesses save as many steps as elsewhere
        ([1, 10, 20, 105, 1], 8, 7),  # after a wrong one the right ones before it run again, with the next token
        ([1, 10, 50, 75, 1], 8, 8),
    ],
)
def test_recurrent_states_go_back_behind_a_wrong_guess(part: type, prompt: list[int], new: int, steps: int) -> None:
    made, sequence, seen = engine(part(), state_slots=2), asked(prompt, new, lookup=PromptLookup(4)), 0
    made.add(sequence)
    while made.step():
        seen += 1
    assert (sequence.new_tokens, seen) == (answer(prompt, new), steps)
    slots = made.scheduler.slots
    assert slots is not None
    assert slots.free == slots.total == 2


def test_a_guess_never_takes_the_states_that_another_sequence_needs() -> None:
    made, sequences = engine(States(), state_slots=2), [asked([0] * 9, 4, lookup=PromptLookup(4)) for _ in range(3)]
    run(made, *sequences)
    assert [s.new_tokens for s in sequences] == [[0] * 4] * 3
    assert all(s.guessed == 0 for s in sequences[:2])  # the third waited for them
    assert made.guesses["lookup"].guessed == sequences[2].guessed > 0
