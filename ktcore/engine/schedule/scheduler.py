"""Chooses the tokens of each step: one for every sequence that decodes, what is left for prompts in chunks."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import dataclass

from ktcore.engine.prefix.cache import PrefixCache
from ktcore.engine.schedule.batch import Span, step_batch
from ktcore.engine.schedule.fairness import FairQueue
from ktcore.engine.schedule.pages import PageAllocator
from ktcore.engine.schedule.sequence import Finish, Sequence
from ktcore.ops.batch import StepBatch
from ktcore.placement.memory import LONG_SHARE

STATE_GUESSES = 3
"""Most guesses behind recurrent states: of more tokens than a few at once they are computed in chunks, which round
otherwise than one after another does."""


@dataclass(frozen=True)
class Scheduled:
    """A step's batch: sequence i runs `counts[i]` of its pending tokens, and then the guesses `guesses[i]`."""

    sequences: tuple[Sequence, ...]
    counts: tuple[int, ...]
    guesses: tuple[tuple[int, ...], ...]
    step: StepBatch

    @property
    def decodes(self) -> bool:
        """Whether every sequence runs its last token, behind others, and guesses, and gives the next ones."""
        return all(s.decodes and s.pending == 1 for s in self.sequences)

    @property
    def decoding(self) -> int:
        """Sequences that run their last token, behind others; asked before the step is recorded."""
        return sum(s.decodes for s in self.sequences)

    @property
    def prompt_tokens(self) -> int:
        """Tokens of prompts."""
        return sum(n for s, n in zip(self.sequences, self.counts, strict=True) if not s.decodes)


class Scheduler:
    """Admits sequences while there are pages for their prompts, and has the youngest make room when pages run out.

    A sequence that made room comes back before all newcomers and computes again what the prefix cache has not kept.

    Args:
        chunk: most tokens of a step.
        slots: of the recurrent states, where the model has some: a sequence holds one as long as it runs.
        long_chunk: most tokens of a step that one long prompt has for itself, where that is more.
        keeps_states: steps keep the states from before their guesses in spare slots; else those slots are copies from
            before the step.

    Attributes:
        apart: the sequences of the batch of prompts that runs apart; empty when there is none, and when one of its
            sequences has lost its pages, after which the batch must not go on.
    """

    def __init__(
        self,
        pages: PageAllocator,
        prefix: PrefixCache,
        chunk: int,
        slots: PageAllocator | None = None,
        long_chunk: int = 0,
        keeps_states: bool = False,
    ) -> None:
        self.pages = pages
        self.prefix = prefix
        self.slots = slots
        self.chunk = chunk
        self.long_chunk = long_chunk
        self.keeps_states = keeps_states
        self.waiting = FairQueue()
        self.running: list[Sequence] = []
        self.apart: tuple[Sequence, ...] = ()
        self.preemptions = 0
        self._arrivals = itertools.count()

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence."""
        sequence.arrival = next(self._arrivals)
        self.prefix.begin(sequence)
        self.waiting.add(sequence)

    def next_batch(self, prompt_limit: int | None = None) -> Scheduled | None:
        """The next step's batch of at most `chunk` tokens, or of one long prompt; None when nothing is left to do.

        Args:
            prompt_limit: most tokens of prompts among them, where sequences decode.
        """
        self._admit()
        chosen = self._decoders()
        budget = self.chunk - sum(count for _, count in chosen)
        if chosen and prompt_limit is not None:
            budget = min(budget, prompt_limit)
        taken = {id(s) for s, _ in chosen}
        chosen += self._prompts(budget, alone=not chosen and not self.apart)
        if not chosen:
            return None
        # guesses only with what is left over
        spare = self.chunk - sum(count for _, count in chosen)
        guesses = []
        for sequence, _ in chosen:
            guesses.append(self._guess(sequence, spare) if id(sequence) in taken else ())
            spare -= len(guesses[-1])
        sequences = tuple(s for s, _ in chosen)
        counts = tuple(n for _, n in chosen)
        return Scheduled(sequences, counts, tuple(guesses), self._step(sequences, counts, guesses))

    @property
    def pending(self) -> int:
        """Tokens of prompts that are yet to be computed, of sequences that wait too."""
        return sum(s.pending for s in self._prompting()) + sum(s.pending for s in self.waiting)

    def batch_apart(self, tokens: int) -> Scheduled | None:
        """A batch of prompts alone, at most so many tokens of them, during which other batches may run; None without
        any. Its sequences are left alone until `ran` tells of it, or one of them has lost its pages (`apart`)."""
        chosen = self._prompts(tokens)
        if self.slots is not None:
            # where a batch is given up, a state that went on cannot be taken back; of one sequence it is given up too
            chosen = chosen[:1]
        if not chosen:
            return None
        self.apart = tuple(s for s, _ in chosen)
        counts = tuple(n for _, n in chosen)
        guesses = ((),) * len(chosen)
        return Scheduled(self.apart, counts, guesses, self._step(self.apart, counts, guesses))

    def _alone(self, sequence: Sequence) -> int:
        """Tokens that a long prompt may have in a step of its own.

        Who comes behind it waits for one such step: no longer than in proportion to those before. Steps whose logits
        are all kept hold a row of the vocabulary a token, and stay short.
        """
        return 0 if sequence.all_logits else min(sequence.cached // LONG_SHARE, self.long_chunk)

    def ran(self, batch: Scheduled) -> None:
        """Record that the batch's tokens, without guesses, are in the cache now."""
        if batch.sequences is self.apart:
            self.apart = ()
        for sequence, count in zip(batch.sequences, batch.counts, strict=True):
            self.waiting.charge(sequence, 1 if sequence.decodes else count, drawn=sequence.decodes)
            sequence.cached += count
            sequence.rewound = False
            # states are behind the guesses by now: `checked` knows whether they are worth keeping
            if sequence.spare_slot is None:
                self.prefix.passed(sequence)

    def checked(self, batch: Scheduled) -> None:
        """Settle what became of the batch's guesses: states that ran wrong ones are given up for those before."""
        for i, (sequence, count, guess) in enumerate(zip(batch.sequences, batch.counts, batch.guesses, strict=True)):
            if sequence.spare_slot is None:
                continue
            assert self.slots is not None
            assert sequence.state_slot is not None
            begin = batch.step.context_lens[i] - len(guess) - count
            if sequence.cached == begin + count + len(guess):
                self.prefix.passed(sequence)
            else:
                sequence.state_slot, sequence.spare_slot = sequence.spare_slot, sequence.state_slot
                sequence.cached = begin + count if self.keeps_states else begin
                sequence.rewound = sequence.pending > 1
            self.slots.give_back([sequence.spare_slot])
            sequence.spare_slot = None

    def retire(self) -> None:
        """Take the pages back from sequences that have ended."""
        for sequence in [s for s in self.running if s.finish is not None]:
            self._release(sequence)
            self.waiting.ended(sequence)

    def cancel(self, sequence: Sequence) -> None:
        """End a sequence wherever it is; ending one twice does nothing."""
        if sequence in self.waiting:
            self.waiting.take(sequence)
            self.waiting.ended(sequence)
        if sequence.finish is None:
            sequence.finish = Finish.CANCELLED
        self.retire()

    def _admit(self) -> None:
        for sequence in list(self.waiting):
            if not self.prefix.ready(sequence):
                if self.running or len(self.waiting) > 1:
                    continue
                self.prefix.wait(sequence)
            if self.slots is not None and not self.slots.free:
                return
            found = self.prefix.find(sequence)
            if self._computed_now(sequence, found.missing):
                self.prefix.drop(found)
                continue
            count = self.pages.needed(len(sequence.tokens)) - len(found.shared)
            # one page for every sequence that will grow, or the newcomer would only be turned out again
            wanted = count + sum(self.pages.needed(s.longest) > len(s.pages) for s in self.running)
            if wanted > self.pages.free:
                self.prefix.copy_out(None)
            if wanted > self.pages.free:
                self.prefix.drop(found)
                return
            fresh = self.pages.take(count)
            sequence.pages = [page if page is not None else fresh.pop() for page in found.pages] + fresh
            if self.slots is not None:
                sequence.state_slot = self.slots.take(1)[0]
            self.waiting.take(sequence)
            self.running.append(sequence)
            self.prefix.restore(found, sequence)

    def _computed_now(self, sequence: Sequence, missing: int) -> bool:
        """Whether a running sequence computes the page that this one needs next: it is worth waiting for."""
        names = sequence.prefix.digests
        if missing >= min(len(names), self.prefix.limit(sequence)):
            return False
        return any(
            r.prefix.named <= missing < len(r.prefix.digests) and r.prefix.digests[missing] == names[missing]
            for r in self.running
        )

    def _decoders(self) -> list[tuple[Sequence, int]]:
        """Sequences that run their last token, with pages for it; they go first, so that prompts never hold them up."""
        chosen: list[tuple[Sequence, int]] = []
        left = self.chunk
        for sequence in list(self.running):
            if sequence not in self.running or not sequence.decodes:
                continue
            if sequence.pending <= left and self._grow(sequence, len(sequence.tokens)):
                chosen.append((sequence, sequence.pending))
                left -= sequence.pending
        return [(s, n) for s, n in chosen if s in self.running]

    def _prompting(self) -> list[Sequence]:
        return [s for s in self.running if not s.decodes and s not in self.apart]

    def _prompts(self, budget: int, alone: bool = False) -> list[tuple[Sequence, int]]:
        """Tokens of prompts, first of whom was served least: a short one is not held up by another user's long one.

        Args:
            alone: nothing else runs, so the first may have more than `budget` where that is worth it.
        """
        chosen: list[tuple[Sequence, int]] = []
        for sequence in sorted(self._prompting(), key=self.waiting.rank):
            most = max(budget, self._alone(sequence)) if alone and not chosen else budget
            count = min(sequence.pending, most)
            ahead = [border - sequence.cached for border in sequence.prefix.borders if border > sequence.cached]
            count = min([count, *ahead])
            if count > 0:
                chosen.append((sequence, count))
                budget -= count
        return chosen

    def _grow(self, sequence: Sequence, tokens: int) -> bool:
        """Give it pages for `tokens` tokens, if need be of younger ones; False where it had to make room itself."""
        while (missing := self.pages.needed(tokens) - len(sequence.pages)) > 0:
            if missing > self.pages.free:
                self.prefix.copy_out(None)
            if missing <= self.pages.free:
                sequence.pages += self.pages.take(missing)
                break
            # prompts whose logits are wanted cannot begin again: some of those are given away already
            others = [s for s in self.running if not s.all_logits]
            victim = max(others, key=lambda s: s.arrival)
            self._preempt(victim)
            if victim is sequence:
                return False
        return True

    def _preempt(self, sequence: Sequence) -> None:
        self._release(sequence)
        sequence.cached, sequence.rewound = 0, False
        sequence.preempted += 1
        self.preemptions += 1
        self.prefix.begin(sequence)
        self.waiting.put_back(sequence)

    def _release(self, sequence: Sequence) -> None:
        self.running.remove(sequence)
        if sequence in self.apart:
            self.apart = ()
        self.prefix.leave(sequence)
        self.pages.give_back(sequence.pages)
        sequence.pages = []
        if self.slots is not None:
            self.slots.give_back([s for s in (sequence.state_slot, sequence.spare_slot) if s is not None])
            sequence.state_slot = sequence.spare_slot = None

    def hold_guesses(self, sequence: Sequence, most: int) -> int:
        """How many tokens may be guessed behind a sequence's last one, at most `most`: it gets the pages for them.

        Never at another's cost: only with free pages, and one is left for every sequence that runs.
        """
        count = min(most, sequence.longest - len(sequence.tokens) - 1)
        if self.slots is not None:
            count = min(count, STATE_GUESSES)
        if self.slots is not None and not self.prefix.off:  # states are kept for others where a page ends
            count = min(count, -len(sequence.tokens) % self.pages.page_size)
        free = max(0, self.pages.free - len(self.running))
        count = min(count, (len(sequence.pages) + free) * self.pages.page_size - len(sequence.tokens))
        if count <= 0:
            return 0
        missing = self.pages.needed(len(sequence.tokens) + count) - len(sequence.pages)
        if missing > 0:
            sequence.pages += self.pages.take(missing)
        return count

    def _guess(self, sequence: Sequence, spare: int) -> tuple[int, ...]:
        """Guessed tokens, where nothing stands against checking some."""
        if sequence.rewound or (self.slots is not None and (len(self.waiting) or not self.slots.free)):
            return ()
        room = min(spare, sequence.longest - len(sequence.tokens) - 1)
        guess = sequence.guess(room) if room > 0 else []
        guess = guess[: self.hold_guesses(sequence, len(guess))] if guess else []
        if guess and self.slots is not None:
            sequence.spare_slot = self.slots.take(1)[0]
        return tuple(guess)

    def _step(
        self, sequences: tuple[Sequence, ...], counts: tuple[int, ...], guesses: Iterable[tuple[int, ...]]
    ) -> StepBatch:
        spans = [
            Span(s, [*s.tokens[s.cached : s.cached + n], *g], s.cached, n if g and self.keeps_states else 0)
            for s, n, g in zip(sequences, counts, guesses, strict=True)
        ]
        return step_batch(spans, self.pages.page_size)
