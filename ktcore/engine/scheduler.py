"""Chooses the tokens of each step: one for every sequence that decodes, what is left for prompts in chunks."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

import torch

from ktcore.engine.pages import PageAllocator
from ktcore.engine.sequence import Finish, Sequence
from ktcore.ops.batch import StepBatch


@dataclass(frozen=True)
class Scheduled:
    """A step's batch: sequence i runs `counts[i]` of its pending tokens."""

    sequences: tuple[Sequence, ...]
    counts: tuple[int, ...]
    step: StepBatch

    @property
    def decodes(self) -> bool:
        """Whether every sequence runs its last token, behind others, and gives the next one."""
        return all(s.pending == 1 and s.cached and not s.all_logits for s in self.sequences)


class Scheduler:
    """First come, first served; a sequence is admitted when pages for its longest possible length are free.

    Args:
        slots: of the recurrent states, where the model has some: a sequence holds one as long as it runs.
    """

    def __init__(self, pages: PageAllocator, chunk: int, slots: PageAllocator | None = None) -> None:
        self.pages = pages
        self.slots = slots
        self.chunk = chunk
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence."""
        self.waiting.append(sequence)

    def next_batch(self) -> Scheduled | None:
        """The next step's batch of at most `chunk` tokens; None when nothing is left to do."""
        self._admit()
        budget = self.chunk
        chosen: list[tuple[Sequence, int]] = []
        # sequences that decode have one pending token each and go first, so that prompts never hold them up
        for sequence in sorted(self.running, key=lambda s: s.pending > 1):
            count = min(sequence.pending, budget)
            if count > 0:
                chosen.append((sequence, count))
                budget -= count
        if not chosen:
            return None
        sequences = tuple(s for s, _ in chosen)
        counts = tuple(n for _, n in chosen)
        return Scheduled(sequences, counts, self._step(sequences, counts))

    def ran(self, batch: Scheduled) -> None:
        """Record that the batch's tokens are in the cache now."""
        for sequence, count in zip(batch.sequences, batch.counts, strict=True):
            sequence.cached += count

    def retire(self) -> None:
        """Take the pages back from sequences that have ended."""
        for sequence in [s for s in self.running if s.finish is not None]:
            self.running.remove(sequence)
            self.pages.give_back(sequence.pages)
            sequence.pages = []
            if self.slots is not None and sequence.state_slot is not None:
                self.slots.give_back([sequence.state_slot])
                sequence.state_slot = None

    def cancel(self, sequence: Sequence) -> None:
        """End a sequence wherever it is; ending one twice does nothing."""
        if sequence in self.waiting:
            self.waiting.remove(sequence)
        if sequence.finish is None:
            sequence.finish = Finish.CANCELLED
        self.retire()

    def _admit(self) -> None:
        while self.waiting:
            count = self.pages.needed(self.waiting[0].longest)
            if count > self.pages.free or (self.slots is not None and not self.slots.free):
                return
            sequence = self.waiting.popleft()
            sequence.pages = self.pages.take(count)
            if self.slots is not None:
                sequence.state_slot = self.slots.take(1)[0]
            self.running.append(sequence)

    def _step(self, sequences: tuple[Sequence, ...], counts: tuple[int, ...]) -> StepBatch:
        ids: list[int] = []
        positions: list[int] = []
        starts = [0]
        contexts = []
        width = max(self.pages.needed(s.cached + n) for s, n in zip(sequences, counts, strict=True))
        table = []
        for sequence, count in zip(sequences, counts, strict=True):
            end = sequence.cached + count
            ids += sequence.tokens[sequence.cached : end]
            positions += range(sequence.cached, end)
            starts.append(len(ids))
            contexts.append(end)
            used = sequence.pages[: self.pages.needed(end)]
            table.append(used + [-1] * (width - len(used)))
        return StepBatch(
            token_ids=torch.tensor(ids),
            positions=torch.tensor(positions),
            q_start=tuple(starts),
            context_lens=tuple(contexts),
            block_table=torch.tensor(table, dtype=torch.int32),
            page_size=self.pages.page_size,
            state_slots=tuple(s.state_slot for s in sequences if s.state_slot is not None),
        )
