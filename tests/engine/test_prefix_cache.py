"""What prompts that begin alike need not compute, from every tier, over a model whose answers are known by heart."""

from __future__ import annotations

import re
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from ktcore.engine.prefix.cache import DISK_BYTES, MEMORY_BYTES, ON_DEVICE, PAGES_A_STEP, PrefixOptions
from ktcore.engine.prefix.disk import DiskTier
from ktcore.engine.schedule.sequence import Sequence
from ktcore.engine.step.engine import Engine
from ktcore.ops.sampling import SamplingParams

from .toy import Pages, States, answer, engine, run, toy

GREEDY = SamplingParams(temperature=0)
MEMORY = PrefixOptions(memory=2**20)
SHARED = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3]  # two pages of 4, and a half


def ask(made: Engine, *prompts: list[int], new: int = 3) -> list[int | None]:
    """How many tokens of each prompt were reused; the answers are right."""
    sequences = [Sequence(list(p), GREEDY, new) for p in prompts]
    run(made, *sequences)
    for prompt, sequence in zip(prompts, sequences, strict=True):
        assert sequence.new_tokens == answer(prompt, new)
        assert sequence.error is None
    return [s.prefix.reused for s in sequences]


def stats(made: Engine) -> tuple[int, int, int, int]:
    found = made.prefix.stats
    return found.asked, found.device, found.memory, found.disk


def test_whole_pages_that_prompts_share_are_computed_once() -> None:
    made = engine(prefix=ON_DEVICE)
    assert (made.prefix.off, made.prefix.tiers) == ("", False)
    assert ask(made, [*SHARED, 7]) == [0]
    assert ask(made, [*SHARED, 8, 8]) == [8]
    assert ask(made, SHARED[:8]) == [4], "one token at least is computed"
    assert ask(made, [9, *SHARED]) == [0], "another beginning"
    assert ask(made, [*SHARED, 7, *answer([*SHARED, 7], 3)]) == [12], "an answer is shared too, but for its last token"
    assert stats(made) == (11 + 12 + 8 + 11 + 14, 8 + 4 + 12, 0, 0)
    assert made.scheduler.pages.free == made.scheduler.pages.total


def test_tiers_are_as_large_as_the_guide_says() -> None:
    guide = (Path(__file__).parents[2] / "docs/serving.md").read_text()
    for option, size in (("memory", MEMORY_BYTES), ("disk", DISK_BYTES)):
        (found,) = re.findall(rf"`--prefix-cache-{option}`, (\d+) GiB", guide)
        assert size == int(found) * 2**30


def test_nothing_is_reused_where_nobody_asked_for_it() -> None:
    made = engine()
    assert made.prefix.off == "it was not asked for"
    assert ask(made, [*SHARED, 7]) == ask(made, [*SHARED, 7]) == [0]
    assert stats(made)[1:] == (0, 0, 0)


def test_prompts_that_come_together_wait_for_the_one_that_computes_what_they_share() -> None:
    made = engine(prefix=ON_DEVICE, chunk=4)
    assert ask(made, [*SHARED, 7], [*SHARED, 8], [1, 2]) == [0, 8, 0]
    assert made.scheduler.pages.free == made.scheduler.pages.total


def test_a_prompt_that_must_wait_for_room_holds_nothing_meanwhile() -> None:
    made = engine(context=24, prefix=ON_DEVICE)
    assert ask(made, [*SHARED, 7]) == [0]
    # both begin alike; the second waits until the first has ended, and asks again each time
    assert ask(made, [*SHARED, 8], [*SHARED, 9, *range(6)], new=6) == [8, 8]
    assert made.scheduler.pages.free == made.scheduler.pages.total


def test_logits_of_every_position_are_computed_anew_and_left_for_nobody() -> None:
    made = engine(prefix=ON_DEVICE)
    for _ in range(2):
        sequence = Sequence(list(SHARED), GREEDY, 0, all_logits=True)
        run(made, sequence)
        sums = [sum(SHARED[: i + 1]) for i in range(len(SHARED))]
        assert torch.cat(sequence.logits).argmax(-1).tolist() == sums
    assert ask(made, [*SHARED, 7]) == [0]
    assert stats(made)[1:] == (0, 0, 0)


def test_pages_whose_place_was_needed_come_back_from_main_memory() -> None:
    made = engine(context=16, prefix=MEMORY)
    assert made.prefix.tiers
    assert ask(made, [*SHARED, 7]) == [0]
    assert ask(made, list(range(50, 62)), new=4) == [0]  # takes every page
    assert ask(made, [*SHARED, 7]) == [8]
    assert stats(made)[1:] == (0, 8, 0)
    made.close()
    assert len(made.prefix.memory) == 0


def test_nothing_is_reused_behind_a_page_that_is_gone() -> None:
    prompt = [*range(16), 7]
    made = engine(context=24, prefix=MEMORY)
    first = Sequence(list(prompt), GREEDY, 1)
    run(made, first)
    assert ask(made, list(range(50, 70)), new=4) == [0]  # takes every page
    del made.prefix.memory._held[first.prefix.digests[1]]
    assert ask(made, prompt) == [4]


@pytest.mark.parametrize(("memory", "disk"), [(2**20, False), (0, True), (2**20, True)])
def test_what_every_tier_has_is_not_copied_again(
    memory: int, disk: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = engine(prefix=PrefixOptions(memory, tmp_path if disk else None))
    ask(made, [*SHARED, 7], new=1)
    assert made.settle() is False
    if made.prefix.disk is not None:
        made.prefix.disk.close()  # all is written
    monkeypatch.setattr(made.prefix._transfer, "read_pages", lambda pages: pytest.fail(f"{pages} are copied again"))
    ask(made, [*SHARED, 7], new=1)
    assert made.prefix.leaving == 0


@pytest.mark.parametrize("memory", [0, 2**20])
def test_pages_on_disk_outlive_the_engine(memory: int, tmp_path: Path) -> None:
    options = PrefixOptions(memory=memory, folder=tmp_path)

    def opened(identity: str = "a", page_size: int = 4) -> Engine:
        return Engine(toy(), 64, page_size, prefix=options, identity=identity)

    made = opened()
    assert ask(made, [*SHARED, 7]) == [0]
    made.close()
    made = opened()
    assert ask(made, [*SHARED, 8], [2, 2, 2, 2, 2]) == [8, 0]
    assert stats(made) == (11 + 5, 0, 0, 8)
    assert ask(made, [*SHARED, 9]) == [8]
    assert stats(made)[1:] == (8, 0, 8), "they are on the device now"
    made.close()
    for other in (opened(identity="b"), opened(page_size=2)):
        assert ask(other, [*SHARED, 7]) == [0], "another model's or layout's are not taken"
        other.close()


def test_a_prompt_waits_for_what_is_read_from_disk_and_reads_nothing_behind_a_gap(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options, prompt = PrefixOptions(folder=tmp_path), [*range(20), 7]
    made = Engine(toy(), 64, 4, prefix=options)
    assert ask(made, prompt) == [0]
    made.close()
    read: list[bytes] = []
    plain = DiskTier.get

    def slow(self: DiskTier, name: bytes) -> Any:
        time.sleep(0.02)
        read.append(name)
        return plain(self, name)

    monkeypatch.setattr(DiskTier, "get", slow)
    made = Engine(toy(), 64, 4, prefix=options)
    assert ask(made, prompt) == [20]
    assert len(read) == 5
    made.close()
    read.clear()
    made = Engine(toy(), 64, 4, prefix=options)
    sequence = Sequence(list(prompt), GREEDY, 1)
    made.scheduler.add(sequence)
    second = sequence.prefix.digests[1]
    made.cancel(sequence)
    made.close()
    next(tmp_path.rglob(f"{second.hex()}.kv")).unlink()
    read.clear()
    made = Engine(toy(), 64, 4, prefix=options)
    assert ask(made, prompt) == [4]
    assert len(read) == 1
    made.close()


def test_pages_that_are_left_stay_taken_until_they_are_copied() -> None:
    made = engine(context=64, prefix=MEMORY)
    count = PAGES_A_STEP + 5
    made.add(sequence := Sequence(list(range(4 * count)), GREEDY, 1))
    while sequence.finish is None:
        made.scheduler.ran(batch := made.scheduler.next_batch())  # type: ignore[arg-type]
        sequence.append(0)
        made.prefix.commit(batch.sequences)  # type: ignore[union-attr]
    made.scheduler.retire()
    assert (made.prefix.leaving, made.scheduler.pages.free) == (count, 16 - count)
    assert made.settle(3) is True
    assert (made.prefix.leaving, len(made.prefix.memory)) == (count - 3, 3)
    made.prefix.copy_out()
    assert made.prefix.leaving == count - 3 - PAGES_A_STEP
    assert made.settle() is False
    assert (made.prefix.leaving, made.scheduler.pages.free, len(made.prefix.memory)) == (0, 16, count)


def test_room_is_made_by_copying_what_was_left_and_what_came_back_is_right() -> None:
    made = engine(context=24, prefix=MEMORY, chunk=8)
    prompts = [[i, *SHARED[:6]] for i in range(5)]
    ask(made, *prompts, new=9)
    assert made.scheduler.preemptions > 0
    assert made.scheduler.pages.free + made.prefix.leaving == made.scheduler.pages.total


def test_recurrent_states_are_reused_from_memory_only() -> None:
    made = engine(States(), prefix=ON_DEVICE)
    assert made.prefix.off.startswith("the model has recurrent states, which are kept in main memory or on disk")
    assert ask(made, [*SHARED, 7]) == ask(made, [*SHARED, 7]) == [0]
    assert engine(States(), prefix=MEMORY).prefix.off == ""
    assert engine(States()).prefix.off == "it was not asked for"


@pytest.mark.parametrize("where", ["memory", "disk", "both"])
def test_recurrent_states_are_kept_behind_what_prompts_share_and_behind_answers(where: str, tmp_path: Path) -> None:
    memory, folder = (0 if where == "disk" else 2**20), (None if where == "memory" else tmp_path)
    made = engine(States(), prefix=PrefixOptions(memory, folder))

    def then(*prompts: list[int], new: int = 3) -> list[int | None]:
        nonlocal made
        made.settle()
        if folder is not None:  # what is on disk is all that is left
            made.close()
            made = engine(States(), prefix=PrefixOptions(memory, folder))
        return ask(made, *prompts, new=new)

    assert made.prefix.off == ""
    assert then([*SHARED, 7, 7]) == [0]  # 12 tokens: keeps the state behind 8, the last whole page before the end
    assert then([*SHARED[:6], 0, 0, 1, 1, 1]) == [0]  # shares one page, behind which no state is known yet
    assert then([*SHARED[:6], 2, 2, 2, 2]) == [4]  # now it is
    first = [*SHARED, 7, 7]
    turn = [*first, *answer(first, 9)]
    assert then(first, new=9) == [8]
    assert made.prefix.stats.disk == (0 if where == "memory" else 8)
    assert then([*turn, 5, 5]) == [20]  # 21 tokens: behind the answer's last whole page
    made.close()


def test_what_a_cache_does_not_show_stays_on_the_device(tmp_path: Path) -> None:
    class Plain:
        def __init__(self) -> None:
            self.inner = Pages()

        def allocate_pages(self, pages: int, page_size: int) -> None:
            self.inner.allocate_pages(pages, page_size)

        def __call__(self, *args: Any) -> torch.Tensor:
            return self.inner(*args)

    made = engine(Plain(), prefix=PrefixOptions(memory=2**20, folder=tmp_path))
    assert (made.prefix.off, made.prefix.tiers) == ("", False)
    assert ask(made, [*SHARED, 7]) == [0]
    assert ask(made, [*SHARED, 8]) == [8]
    assert made.prefix.leaving == 0
