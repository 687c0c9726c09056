"""Prompts that pass some layers a step while others decode: answers, bounds, and what happens when one goes away."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from ktcore.engine.schedule.sequence import Sequence
from ktcore.engine.step.engine import Engine
from ktcore.ops.batch import StepBatch
from ktcore.ops.sampling import SamplingParams

from .toy import Pages, States, answer, run, toy

GREEDY = SamplingParams(temperature=0)
LAYERS = 6
LONG = [3 * i % 101 for i in range(60)]


class Fixed:
    """A pace that always allows the same work, and notes what was done beside how many that decoded."""

    def __init__(self, work: int) -> None:
        self.work, self.told = work, list[tuple[int, int]]()

    def most(self, decoding: int) -> int | None:
        return self.work if decoding else None

    def note(self, decoding: int, prompt: int, seconds: float) -> None:
        self.told.append((decoding, prompt))


class Layers:
    """An engine whose model has LAYERS layers, the fourth of which adds up; notes the tokens that each layer takes."""

    def __init__(self, work: int, part: Any = None, owing: bool = False, **options: Any) -> None:
        self.taken: list[tuple[int, int]] = []
        part = part or Pages()
        model = toy(part)
        layers = tuple((self._attention(i, part if i == 3 else None), lambda x: x) for i in range(LAYERS))
        model.deferred.used = owing
        self.engine = Engine(replace(model, layers=layers), options.pop("context", 512), 4, **options)
        self.pace = self.engine.pace = Fixed(work)  # type: ignore[assignment]

    def _attention(self, layer: int, part: Any) -> Any:
        def attention(x: torch.Tensor, step: StepBatch) -> torch.Tensor:
            self.taken.append((layer, step.tokens))
            return x if part is None else part(x, step)

        return attention

    def decoding(self, count: int = 2, new: int = 90) -> list[Sequence]:
        """Sequences that are drawing tokens already."""
        made = [asked([i + 1, 5], new) for i in range(count)]
        for sequence in made:
            self.engine.add(sequence)
        while not all(s.new_tokens for s in made):
            self.engine.step()
        return made


def asked(prompt: list[int], new: int = 5) -> Sequence:
    return Sequence(list(prompt), GREEDY, new)


@pytest.mark.parametrize("part", [Pages, States])
@pytest.mark.parametrize("work", [1, 7, 40, 100, 250, 10_000])
def test_answers_are_those_of_each_prompt_alone(part: type, work: int) -> None:
    made = Layers(work, part(), state_slots=8)
    others = made.decoding(3)
    prompts = [LONG, [5, 6, 7], LONG[:17]]
    run(made.engine, *(new := [asked(p) for p in prompts]))
    assert [s.new_tokens for s in new] == [answer(p, 5) for p in prompts]
    assert [s.new_tokens for s in others] == [answer([i + 1, 5], 90) for i in range(3)]
    assert made.engine.scheduler.pages.free == made.engine.scheduler.pages.total


@pytest.mark.parametrize("work", [16, 40, 100, 250])
def test_every_step_keeps_to_its_work_and_uses_nearly_all_of_it_in_the_end(work: int) -> None:
    made = Layers(work)
    made.decoding()
    made.pace.told.clear()
    new = asked(LONG, 1)
    made.engine.add(new)
    while not new.new_tokens:
        made.engine.step()
    done = [prompt for _, prompt in made.pace.told]
    layer = max(tokens for _, tokens in made.taken if tokens > 2)
    # what a step leaves, because layers are whole, the next one may take
    assert all(sum(done[:n]) <= n * work + layer for n in range(1, len(done) + 1))
    assert max(done) <= work + layer
    assert sum(done) == len(LONG) * LAYERS
    assert len(done) <= -(-len(LONG) * LAYERS // work) + 2


def test_steps_that_decode_come_between_the_layers_of_a_prompt() -> None:
    made = Layers(work=2 * 16)
    others = made.decoding()
    made.engine.add(asked(LONG[:16], 1))
    made.taken.clear()
    drawn = [len(s.new_tokens) for s in others]
    for _ in range(3):
        made.engine.step()
    whole = [(layer, 2) for layer in range(LAYERS)]
    assert made.taken == [(0, 16), (1, 16), *whole, (2, 16), (3, 16), *whole, (4, 16), (5, 16), *whole]
    assert [len(s.new_tokens) for s in others] == [n + 3 for n in drawn]


def test_a_prompt_that_a_step_has_room_for_runs_in_the_same_batch() -> None:
    made = Layers(work=LAYERS * 16)
    made.decoding()
    made.taken.clear()
    made.engine.add(asked(LONG[:16], 1))
    made.engine.step()
    assert made.taken == [(layer, 18) for layer in range(LAYERS)]


def test_nothing_runs_apart_where_layers_owe_each_other_something() -> None:
    made = Layers(work=LAYERS * 4, owing=True)
    made.decoding()
    made.taken.clear()
    made.engine.add(new := asked(LONG[:8], 1))
    for _ in range(2):
        made.engine.step()
    assert made.taken == [(layer, 6) for layer in range(LAYERS)] * 2
    assert new.new_tokens == answer(LONG[:8], 1)


def test_a_step_without_work_leaves_prompts_where_they_are() -> None:
    made = Layers(work=16)
    made.decoding()
    made.engine.add(new := asked(LONG, 1))
    made.engine.step()
    made.pace.work = 0
    made.taken.clear()
    made.engine.step()
    assert made.taken == [(layer, 2) for layer in range(LAYERS)]
    made.pace.work = 16
    run(made.engine)
    assert new.new_tokens == answer(LONG, 1)


def test_where_nothing_decodes_any_more_a_prompt_passes_all_layers_at_once() -> None:
    made = Layers(work=16)
    others = made.decoding()
    made.engine.add(new := asked(LONG[:16], 1))
    made.engine.step()
    for other in others:
        made.engine.cancel(other)
    made.engine.step()
    assert new.new_tokens == answer(LONG[:16], 1)
    assert made.taken[-(LAYERS - 1) :] == [(layer, 16) for layer in range(1, LAYERS)]


@pytest.mark.parametrize("part", [Pages, States])
def test_a_cancelled_prompt_goes_no_further_and_others_of_its_batch_begin_it_again(part: type) -> None:
    made = Layers(100, part(), state_slots=8)
    others = made.decoding()
    first, second = asked(LONG[:9]), asked(LONG[20:40])
    for sequence in (first, second):
        made.engine.add(sequence)
    made.engine.step()
    assert made.engine.scheduler.apart
    gone = made.engine.scheduler.apart[0]
    stays = second if gone is first else first
    made.engine.cancel(gone)
    assert not made.engine.scheduler.apart
    taken = asked([9] * 30)  # gets the pages that were given back
    run(made.engine, taken)
    assert not gone.new_tokens
    assert stays.new_tokens == answer(stays.tokens[: stays.prompt_len], 5)
    assert taken.new_tokens == answer([9] * 30, 5)
    assert [s.new_tokens for s in others] == [answer([i + 1, 5], 90) for i in range(2)]


@pytest.mark.parametrize("part", [Pages, States])
def test_a_prompt_that_has_to_make_room_half_way_is_answered_later(part: type) -> None:
    made = Layers(4, part(), state_slots=8, context=120)
    others = made.decoding(new=60)
    new = asked(LONG, 3)
    run(made.engine, new)
    assert new.preempted > 0
    assert new.new_tokens == answer(LONG, 3)
    assert [s.new_tokens for s in others] == [answer([i + 1, 5], 60) for i in range(2)]
