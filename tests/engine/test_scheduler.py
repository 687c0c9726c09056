"""The scheduler and the page allocator, without a model."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from ktcore.engine.prefix.cache import PrefixCache
from ktcore.engine.prefix.transfer import Transfer
from ktcore.engine.schedule.pages import PageAllocator
from ktcore.engine.schedule.scheduler import Scheduler
from ktcore.engine.schedule.sequence import Finish, Sequence
from ktcore.errors import RequestError
from ktcore.ops.sampling import SamplingParams

GREEDY = SamplingParams(temperature=0)
NO_MODEL: Any = SimpleNamespace(caches=(), states=())


def _scheduler(pages: int, page_size: int, chunk: int, long_chunk: int = 0) -> Scheduler:
    allocator = PageAllocator(pages, page_size)
    prefix = PrefixCache(allocator, Transfer(NO_MODEL), None, False, "")
    return Scheduler(allocator, prefix, chunk, long_chunk=long_chunk)


def _with_states(pages: int, slots: int) -> Scheduler:
    allocator = PageAllocator(pages, 4)
    prefix = PrefixCache(allocator, Transfer(NO_MODEL), None, True, "")
    return Scheduler(allocator, prefix, 64, PageAllocator(slots, 4))


def _sequence(prompt: int, new: int) -> Sequence:
    return Sequence(list(range(prompt)), GREEDY, new)


def test_a_long_prompt_runs_in_chunks_with_the_right_positions_and_contexts() -> None:
    scheduler = _scheduler(8, 4, chunk=5)
    sequence = _sequence(12, 2)
    scheduler.add(sequence)
    seen = []
    for _ in range(3):
        batch = scheduler.next_batch()
        assert batch is not None
        seen.append((batch.step.positions.tolist(), batch.step.context_lens, batch.step.token_ids.tolist()))
        scheduler.ran(batch)
    assert [s[0] for s in seen] == [[0, 1, 2, 3, 4], [5, 6, 7, 8, 9], [10, 11]]
    assert [s[1] for s in seen] == [(5,), (10,), (12,)]
    assert [i for s in seen for i in s[2]] == list(range(12))
    assert sequence.pending == 0


def _counts(scheduler: Scheduler, *sequences: Sequence) -> list[tuple[int, ...]]:
    """Tokens of each sequence, step by step, until none has more."""
    for sequence in sequences:
        scheduler.add(sequence)
    seen = []
    while any(s.pending for s in sequences):
        batch = scheduler.next_batch()
        assert batch is not None
        took = {id(s): n for s, n in zip(batch.sequences, batch.counts, strict=True)}
        seen.append(tuple(took.get(id(s), 0) for s in sequences))
        scheduler.ran(batch)
    return seen


def test_the_steps_of_a_long_prompt_grow_with_what_is_behind_it_where_that_is_wanted() -> None:
    assert _counts(_scheduler(64, 4, 16, long_chunk=24), _sequence(180, 1)) == [
        *[(16,)] * 5,  # a quarter of 80 is the first above 16
        (20,),
        (24,),
        (24,),
        (24,),
        (8,),
    ]
    assert _counts(_scheduler(64, 4, 16), _sequence(180, 1)) == [*[(16,)] * 11, (4,)]


def test_a_step_beside_others_and_one_that_keeps_all_logits_does_not_grow() -> None:
    kept = _sequence(180, 1)
    kept.all_logits = True
    assert max(_counts(_scheduler(64, 4, 16, long_chunk=24), kept)) == (16,)
    scheduler = _scheduler(64, 4, 16, long_chunk=24)
    decoder, prompt = _sequence(4, 8), _sequence(180, 1)
    assert _counts(scheduler, decoder) == [(4,)]
    scheduler.add(prompt)
    while prompt.pending:
        decoder.tokens.append(1)
        batch = scheduler.next_batch()
        assert batch is not None
        assert sum(batch.counts) <= 16
        scheduler.ran(batch)


def test_two_long_prompts_never_share_a_step_that_has_grown() -> None:
    steps = _counts(_scheduler(128, 4, 16, long_chunk=24), _sequence(180, 1), _sequence(180, 1))
    assert any(sum(step) > 16 for step in steps)
    assert all(0 in step for step in steps if sum(step) > 16)


def test_decoding_sequences_go_before_a_newcomers_prompt() -> None:
    scheduler = _scheduler(32, 4, chunk=6)
    first, second = _sequence(3, 4), _sequence(20, 1)
    scheduler.add(first)
    scheduler.ran(scheduler.next_batch())  # type: ignore[arg-type]
    first.append(99)
    scheduler.add(second)
    batch = scheduler.next_batch()
    assert batch is not None
    assert batch.sequences == (first, second)
    assert batch.counts == (1, 5)
    assert batch.step.q_start == (0, 1, 6)
    assert batch.step.positions.tolist() == [3, 0, 1, 2, 3, 4]


def test_prompts_share_what_a_step_may_take() -> None:
    scheduler = _scheduler(32, 4, chunk=6)
    sequences = [_sequence(4, 1) for _ in range(3)]
    for sequence in sequences:
        scheduler.add(sequence)
    batch = scheduler.next_batch()
    assert batch is not None
    assert (batch.sequences, batch.counts) == (tuple(sequences[:2]), (4, 2))


def test_slots_follow_the_block_table() -> None:
    scheduler = _scheduler(8, 4, chunk=64)
    a, b = _sequence(5, 1), _sequence(6, 1)
    scheduler.add(a)
    scheduler.add(b)
    batch = scheduler.next_batch()
    assert batch is not None
    expected = [s.pages[p // 4] * 4 + p % 4 for s, n in ((a, 5), (b, 6)) for p in range(n)]
    assert batch.step.slots().tolist() == expected
    assert not set(a.pages) & set(b.pages)


def test_admission_waits_for_pages_and_goes_on_when_they_come_back() -> None:
    scheduler = _scheduler(4, 4, chunk=64)
    a, b = _sequence(8, 4), _sequence(8, 4)
    scheduler.add(a)
    scheduler.add(b)
    batch = scheduler.next_batch()
    assert batch is not None
    assert batch.sequences == (a,)
    a.finish = Finish.STOP
    scheduler.retire()
    assert a.pages == []
    batch = scheduler.next_batch()
    assert batch is not None
    assert batch.sequences == (b,)


def test_cancelling_returns_the_pages_of_waiting_and_running_sequences() -> None:
    scheduler = _scheduler(4, 4, chunk=64)
    a, b = _sequence(8, 4), _sequence(8, 4)
    scheduler.add(a)
    scheduler.add(b)
    scheduler.next_batch()
    for sequence in (b, a, a):
        scheduler.cancel(sequence)
    assert scheduler.pages.free == 4
    assert scheduler.next_batch() is None
    assert a.finish is b.finish is Finish.CANCELLED


def test_allocator_refuses_more_than_it_has() -> None:
    allocator = PageAllocator(3, 16)
    taken = allocator.take(2)
    assert len(set(taken)) == 2
    with pytest.raises(RequestError, match="2 KV pages are needed, 1 of 3"):
        allocator.take(2)
    allocator.give_back(taken)
    assert sorted(allocator.take(3)) == [0, 1, 2]


def test_pages_are_shared_kept_and_taken_back_the_longest_left_first() -> None:
    allocator = PageAllocator(4, 16)
    first = allocator.take(2)
    assert allocator.register(first[0], b"a")
    assert allocator.register(first[1], b"b")
    assert allocator.share(b"a") == first[0]
    allocator.give_back(first)
    assert (allocator.free, allocator.kept) == (3, 1)  # "a" has an owner still
    allocator.give_back([first[0]])
    assert (allocator.free, allocator.kept) == (4, 2)
    other = allocator.take(3)
    assert not allocator.has(b"b")
    assert allocator.share(b"a") == first[0]
    assert not allocator.register(other[0], b"a")
    with pytest.raises(RequestError, match="1 KV pages are needed, 0 of 4"):
        allocator.take(1)
    allocator.give_back([first[0], *other])
    with pytest.raises(ValueError, match="more often"):
        allocator.give_back([first[0]])


def test_the_youngest_makes_room_and_comes_back_before_newcomers() -> None:
    scheduler = _scheduler(5, 4, chunk=64)
    old, young, late = _sequence(7, 9), _sequence(7, 9), _sequence(3, 1)
    for sequence in (old, young):
        scheduler.add(sequence)
    for _ in range(2):
        batch = scheduler.next_batch()
        assert batch is not None
        assert batch.sequences == (old, young)
        scheduler.ran(batch)
        for sequence in batch.sequences:
            sequence.append(5)
    scheduler.add(late)
    batch = scheduler.next_batch()
    assert batch is not None
    assert batch.sequences == (old,)
    assert (young.pages, young.cached, young.preempted) == ([], 0, 1)
    assert (old.preempted, scheduler.preemptions) == (0, 1)
    assert young.tokens == [*range(7), 5, 5]
    old.finish = Finish.STOP
    scheduler.retire()
    batch = scheduler.next_batch()
    assert batch is not None
    assert batch.sequences == (young, late)
    assert batch.counts == (9, 3)


def test_prompts_are_bounded_beside_sequences_that_decode_and_nowhere_else() -> None:
    scheduler = _scheduler(64, 4, chunk=32)
    first, second = _sequence(3, 4), _sequence(50, 1)
    scheduler.add(first)
    scheduler.ran(scheduler.next_batch(prompt_limit=2))  # type: ignore[arg-type]
    assert first.pending == 0
    first.append(9)
    scheduler.add(second)
    batch = scheduler.next_batch(prompt_limit=2)
    assert batch is not None
    assert batch.counts == (1, 2)
    assert (batch.decoding, batch.prompt_tokens) == (1, 2)
    scheduler.ran(batch)
    first.append(9)
    batch = scheduler.next_batch(prompt_limit=1)
    assert batch is not None
    assert batch.counts == (1, 1)
    assert (batch.decoding, batch.prompt_tokens) == (1, 1)  # one token of a prompt is none that was drawn
    scheduler.cancel(first)
    batch = scheduler.next_batch(prompt_limit=2)
    assert batch is not None
    assert batch.counts == (32,)


def test_a_sequence_holds_one_state_as_long_as_it_runs() -> None:
    scheduler = _with_states(pages=64, slots=2)
    first, second, third = (_sequence(3, 4) for _ in range(3))
    for sequence in (first, second, third):
        scheduler.add(sequence)
    batch = scheduler.next_batch()
    assert batch is not None
    assert batch.sequences == (first, second)
    assert batch.step.state_slots == (first.state_slot, second.state_slot) == (0, 1)
    scheduler.ran(batch)
    first.finish = Finish.STOP
    scheduler.retire()
    assert first.state_slot is None
    second.append(9)
    batch = scheduler.next_batch()
    assert batch is not None
    assert batch.sequences == (second, third)
    assert batch.step.state_slots == (1, 0)
    for sequence in (second, third):
        scheduler.cancel(sequence)
    assert scheduler.slots is not None
    assert (scheduler.slots.free, scheduler.pages.free) == (2, 64)


def test_tables_are_as_wide_as_the_longest_and_show_pages_in_use_only() -> None:
    scheduler = _scheduler(16, 4, chunk=64)
    short, long = _sequence(2, 1), _sequence(9, 1)
    scheduler.add(short)
    scheduler.add(long)
    batch = scheduler.next_batch()
    assert batch is not None
    assert batch.step.block_table.tolist() == [[*short.pages, -1, -1], long.pages]
    assert batch.step.block_table.dtype == torch.int32
    assert batch.step.state_slots == ()


def test_a_page_held_by_two_is_free_when_both_have_given_it_back() -> None:
    allocator = PageAllocator(2, 16)
    (page,) = allocator.take(1)
    allocator.hold(page)
    allocator.give_back([page])
    assert allocator.free == 1
    allocator.give_back([page])
    assert (allocator.free, allocator.kept) == (2, 0)


def test_one_page_stays_free_for_each_that_will_grow() -> None:
    scheduler = _scheduler(4, 4, chunk=64)
    growing, late = _sequence(4, 9), _sequence(12, 1)
    scheduler.add(growing)
    scheduler.add(late)
    batch = scheduler.next_batch()
    assert batch is not None
    assert batch.sequences == (growing,), "three pages are free, but one of them is spoken for"
    full = _scheduler(4, 4, chunk=64)
    done, late = _sequence(3, 1), _sequence(12, 1)
    full.add(done)
    full.add(late)
    batch = full.next_batch()
    assert batch is not None
    assert batch.sequences == (done, late)


def test_what_a_sequence_is_decides_what_it_runs() -> None:
    plain, whole = _sequence(3, 2), Sequence([1, 2, 3], GREEDY, 0, all_logits=True)
    assert (plain.pending, plain.longest, plain.new_tokens, plain.decodes) == (3, 5, [], False)
    for sequence in (plain, whole):
        sequence.cached = 2
    assert (plain.decodes, whole.decodes) == (True, False)
    plain.append(7)
    assert (plain.new_tokens, plain.pending, plain.decodes, plain.finish) == ([7], 2, False, None)
    plain.append(8)
    assert (plain.new_tokens, plain.finish) == ([7, 8], Finish.LENGTH)
    plain.fail(error := ValueError())
    assert (plain.error, plain.finish) == (error, Finish.CANCELLED)


def test_seeds_make_generators_alike_and_none_makes_them_differ() -> None:
    def first(seed: int | None) -> int:
        generator = Sequence([1], SamplingParams(seed=seed), 1).generator
        assert generator is not None
        return generator.initial_seed()

    assert first(7) == first(7) == 7
    assert first(None) != first(None)
    assert _sequence(1, 1).generator is None
