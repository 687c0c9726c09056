"""What may be asked for as a drafter, and a smaller model that drafts, over models whose answers are known by heart."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from ktcore.engine.draft.asked import Draft, read_draft
from ktcore.engine.draft.pair import PairDrafter
from ktcore.engine.prefix.cache import PrefixOptions
from ktcore.engine.schedule.drafts import Drafts
from ktcore.engine.schedule.lookahead import PromptLookup
from ktcore.engine.schedule.sequence import Sequence
from ktcore.engine.step.drafter import Drafting
from ktcore.engine.step.engine import Engine
from ktcore.errors import RequestError
from ktcore.ops.sampling import SamplingParams

from .toy import VOCAB, KeptStates, Pages, States, answer, run, toy

GREEDY = SamplingParams(temperature=0)


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        (None, None),
        ("mtp", Draft(1)),
        ("mtp:2", Draft(2)),
        ("small.gguf", Draft(4, Path("small.gguf"))),
        ("small.gguf:16", Draft(16, Path("small.gguf"))),
        (Path("a:b/small.gguf"), Draft(4, Path("a:b/small.gguf"))),
        ("a:b:1", Draft(1, Path("a:b"))),
    ],
)
def test_a_drafter_is_a_word_or_a_path_with_a_count(given: Any, wanted: Draft | None) -> None:
    assert read_draft(given) == wanted


@pytest.mark.parametrize("given", ["mtp:0", "mtp:17", "mtp:-1", "small.gguf:0", "", 2, b"mtp", True, ["mtp"]])
def test_anything_else_is_refused_and_says_what_may_be_given(given: Any) -> None:
    with pytest.raises(RequestError, match="draft") as caught:
        read_draft(given)
    assert '"mtp:2"' in str(caught.value.hint)


def paired(most: int, small: Any = None, part: Any = None, wrong: int = 0, **options: Any) -> Engine:
    """An engine whose drafter is the toy again, which is wrong behind every `wrong`-th token where that is not 0."""
    pages = small or Pages()

    def head(x: torch.Tensor) -> torch.Tensor:
        return torch.roll(x, 1, -1) if wrong and int(x.argmax(-1)[0]) % wrong == 0 else x

    model = toy(pages, head=head)
    drafting = Drafting(lambda _, scheduler: PairDrafter(model, scheduler, most, VOCAB), model)
    return Engine(toy(part), 256, 4, drafting=drafting, **options)


def asked(made: Engine, prompt: list[int], new: int, most: int | None = None, **more: Any) -> Sequence:
    return Sequence(list(prompt), GREEDY, new, drafts=made.drafts(most), **more)


@pytest.mark.parametrize("most", [1, 2, 5])
@pytest.mark.parametrize("chunk", [7, 64])
@pytest.mark.parametrize("wrong", [0, 2, 3])
@pytest.mark.parametrize("part", [Pages, States, KeptStates])
def test_a_model_drafts_what_it_would_draw_itself(most: int, chunk: int, wrong: int, part: type) -> None:
    made = paired(most, part=part(), wrong=wrong, chunk=chunk, state_slots=12)
    prompts = [[i + 1, 7 * i, 90, *range(3 * i)] for i in range(5)]
    sequences = [asked(made, p, 12 + i) for i, p in enumerate(prompts)]
    run(made, *sequences)
    assert [s.new_tokens for s in sequences] == [answer(p, 12 + i) for i, p in enumerate(prompts)]
    tally = made.guesses["model"]
    assert tally.guessed == sum(s.guessed for s in sequences) > 0
    assert tally.right == sum(s.right for s in sequences) > 0
    assert (tally.right < tally.guessed) is (wrong > 0)
    assert made.scheduler.pages.free == made.scheduler.pages.total


def test_right_drafts_save_steps() -> None:
    steps = []
    for most in (0, 1, 3):
        made, count = paired(3), 0
        sequence = asked(made, [1, 2, 3], 13, most)
        made.add(sequence)
        while made.step():
            count += 1
        steps.append(count)
        assert sequence.new_tokens == answer([1, 2, 3], 13)
    assert steps == [13, 7, 4]


def test_the_drafter_keeps_up_with_prompts_that_are_shared_and_with_those_that_made_room() -> None:
    made = paired(2, prefix=PrefixOptions(memory=2**20))
    prompt = [*range(1, 40)]
    first, second, other = asked(made, prompt, 9), asked(made, [*prompt, 5], 9), asked(made, [3], 120, 0)
    run(made, first, other)
    run(made, second)
    assert second.prefix.reused == 36
    assert (first.new_tokens, second.new_tokens) == (answer(prompt, 9), answer([*prompt, 5], 9))
    assert second.right == second.guessed > 0
    small = paired(2, prefix=PrefixOptions(memory=2**20))
    crowd = [asked(small, [i, *range(30)], 60) for i in range(4)]
    run(small, *crowd)
    assert small.scheduler.preemptions > 0
    assert [s.new_tokens for s in crowd] == [answer([i, *range(30)], 60) for i in range(4)]
    assert all(s.right == s.guessed > 0 for s in crowd)


def test_what_was_looked_up_goes_before_what_was_drafted() -> None:
    made = paired(2)
    sequence = asked(made, [0] * 9, 12, lookup=PromptLookup(4))
    run(made, sequence)
    assert sequence.new_tokens == [0] * 12
    assert made.guesses["lookup"].right > 0
    mixed = asked(made, [1, 2, 3], 9, lookup=PromptLookup(4))
    run(made, mixed)
    assert mixed.new_tokens == answer([1, 2, 3], 9)
    assert made.guesses["model"].right > 0


def test_more_drafts_than_the_drafter_makes_are_refused() -> None:
    with pytest.raises(RequestError, match="draft=3: this model drafts 2 tokens"):
        paired(2).drafts(3)
    with pytest.raises(RequestError, match="draft=1: this model drafts no tokens"):
        Engine(toy(), 64, 4).drafts(1)
    assert Engine(toy(), 64, 4).drafts(None) is None
    assert paired(2).drafts(0) is None


def test_proposals_are_for_the_tokens_that_they_were_made_behind() -> None:
    drafts = Drafts(3)
    drafts.propose([7, 8, 9], 5)
    assert drafts.guess([0] * 5, 2) == [7, 8]
    assert drafts.guess([0] * 6, 2) == []
