"""Slots of a ragged batch."""

from __future__ import annotations

import torch

from ktcore.ops.batch import StepBatch
from ktcore.ops.kv_cache import sequence_slots


def test_slots_follow_the_block_table() -> None:
    # a decode step of a long sequence beside the first tokens of a short one, pages of 4
    step = StepBatch(
        token_ids=torch.arange(4),
        positions=torch.tensor([9, 0, 1, 2]),
        q_start=(0, 1, 4),
        context_lens=(10, 3),
        block_table=torch.tensor([[5, 2, 7], [3, -1, -1]], dtype=torch.int32),
        page_size=4,
    )
    assert (step.tokens, step.sequences) == (4, 2)
    assert step.slots().tolist() == [29, 12, 13, 14]
    assert step.slots().dtype == torch.int64
    assert [step.starts(i) for i in range(2)] == [False, True]
    (first, cached), (second, fresh) = sequence_slots(step)
    assert cached.tolist() == [20, 21, 22, 23, 8, 9, 10, 11, 28, 29]
    assert fresh.tolist() == [12, 13, 14]
    assert (first, second) == (slice(0, 1), slice(1, 4))


def test_derived_values_are_made_once_a_step() -> None:
    step = StepBatch(torch.tensor([1]), torch.tensor([0]), (0, 1), (1,), torch.zeros(1, 1, dtype=torch.int32), 16)
    made = [step.derived("key", lambda s: object()) for _ in range(2)]
    assert made[0] is made[1]


def test_a_step_is_shown_without_what_was_derived() -> None:
    step = StepBatch(torch.tensor([1]), torch.tensor([0]), (0, 1), (1,), torch.zeros(1, 1, dtype=torch.int32), 16)
    before = repr(step)
    step.derived("key", lambda s: "a table of megabytes")
    assert repr(step) == before
