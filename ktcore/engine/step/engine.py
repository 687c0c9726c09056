"""The step loop: schedule a batch, run the model on it, sample, update the sequences."""

from __future__ import annotations

import time
from collections.abc import Iterable

import torch

from ktcore.engine.prefix.cache import PrefixCache, PrefixOptions
from ktcore.engine.prefix.transfer import Transfer
from ktcore.engine.schedule.drafts import Drafts
from ktcore.engine.schedule.pace import LEAST, Pace
from ktcore.engine.schedule.pages import PageAllocator
from ktcore.engine.schedule.scheduler import Scheduled, Scheduler
from ktcore.engine.schedule.sequence import Finish, Sequence
from ktcore.engine.step.decode_graph import DecodeGraphs, one_by_one
from ktcore.engine.step.drafter import LOOKUP, Drafting, Tally
from ktcore.engine.step.prompt_pass import PromptPass
from ktcore.engine.step.runner import LoadedModel
from ktcore.engine.step.sampler import draw
from ktcore.engine.step.scores import Scores
from ktcore.errors import ContextError, LogitsError, RequestError
from ktcore.placement.memory import STATE_SLOTS, STEP_TOKENS


class Engine:
    """Serves sequences over one loaded model. It owns its pages and its scheduler; nothing is shared between engines.

    Args:
        context: tokens that fit into the KV cache, all running sequences together.
        page_size: tokens a page, as the plan negotiated it.
        chunk: most tokens of one step; longer prompts run in several.
        long_chunk: most of one long prompt alone, where that is more than `chunk`.
        state_slots: most sequences at once, where the model has recurrent states.
        graphs: capture decode steps as device graphs where the model allows it (`LoadedModel.no_graphs` says why not).
        prefix: what prompts that begin alike share; None shares nothing.
        identity: names model and plan, for prefixes on disk.
        drafting: what proposes next tokens; None: nothing does, beyond what sequences look up themselves.

    Attributes:
        drafter: proposes next tokens, where it was asked for one.
        guesses: how many tokens were guessed since the start, by what guessed them.
        pace: bounds what prompts may add to a step beside sequences that decode; None: nothing but the chunk does.
    """

    def __init__(
        self,
        model: LoadedModel,
        context: int,
        page_size: int,
        chunk: int = STEP_TOKENS,
        long_chunk: int = 0,
        state_slots: int = STATE_SLOTS,
        graphs: bool = True,
        prefix: PrefixOptions | None = None,
        identity: str = "",
        drafting: Drafting | None = None,
    ) -> None:
        self.model = model
        self.pace: Pace | None = None
        self._apart: PromptPass | None = None
        self._layers = len(model.layers)
        self.context = context
        pages = -(-context // page_size)
        captures = int(graphs and model.graph_device is not None)
        # captured steps need a page, and a state, that no sequence owns
        model.allocate_pages(pages + captures, page_size)
        small = None if drafting is None else drafting.caches
        if small is not None:
            small.allocate_pages(pages + captures, page_size)
        slots = None
        if model.states:
            model.allocate_states(state_slots + captures)
            slots = PageAllocator(state_slots, page_size)
        self.graphs = None
        if captures:
            self.graphs = DecodeGraphs(model, pages, state_slots if model.states else None, page_size, pages)
        allocator = PageAllocator(pages, page_size)
        self.prefix = PrefixCache(
            allocator, Transfer(model, small.caches if small else ()), prefix, slots is not None, identity
        )
        self.scheduler = Scheduler(allocator, self.prefix, chunk, slots, long_chunk, model.keeps_states)
        self.drafter = None if drafting is None else drafting.make(model, self.scheduler)
        self.guesses = {name: Tally() for name in (LOOKUP, *([self.drafter.name] if self.drafter else []))}

    def check(self, sequence: Sequence) -> None:
        """Refuse what can never run; any thread may ask.

        Raises:
            RequestError: the prompt is empty, or (ContextError) does not fit into the context.
        """
        if not sequence.tokens:
            raise RequestError("the prompt is empty: there is no token to continue from")
        room = self.context - sequence.prompt_len
        # an answer needs at least one place; logits of the prompt alone need none
        if room < 0 or (room == 0 and sequence.max_new_tokens > 0):
            raise ContextError(
                f"the prompt has {sequence.prompt_len} tokens, the context holds {self.context}",
                "shorten it, or load the model with a larger context= (--context)",
            )

    def drafts(self, most: int | None) -> Drafts | None:
        """For a sequence that takes the drafter's proposals, at most so many at once; None: as many as it makes.

        Raises:
            RequestError: more than it makes.
        """
        made = 0 if self.drafter is None else self.drafter.most
        if most is not None and most > made:
            raise RequestError(
                f"draft={most}: this model drafts {made or 'no'} tokens",
                "load it with draft= (--draft), for so many" if not made else "ask for fewer",
            )
        count = made if most is None else most
        return Drafts(count) if count else None

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence.

        Raises:
            RequestError: as `check` does.
        """
        self.check(sequence)
        room = self.context - sequence.prompt_len
        if sequence.max_new_tokens == 0 and not sequence.all_logits:
            sequence.finish = Finish.LENGTH
            return
        sequence.max_new_tokens = min(sequence.max_new_tokens, room)
        self.scheduler.add(sequence)

    def step(self) -> bool:
        """One step over all running sequences; False when there was nothing to do."""
        with torch.inference_mode(), self.model.running():
            work = None if self.pace is None else self.pace.most(sum(s.decodes for s in self.scheduler.running))
            limit = self._beside(work)
            batch = self.scheduler.next_batch(limit)
            began = time.perf_counter()
            # first, so that drawing tokens waits for it on every device
            done = self._go_apart(work, limit)
            if batch is None and not done:
                return False
            if batch is not None:
                decoding = batch.decoding
                done += batch.prompt_tokens * self._layers
                self._run(batch)
                if self.pace is not None:
                    self.pace.note(decoding, done, time.perf_counter() - began)
            self.scheduler.retire()
            self.prefix.copy_out()
        return True

    def settle(self, most: int | None = None) -> bool:
        """Copy pages that sequences left to further tiers of the prefix cache, at most so many; False when all are."""
        if self.prefix.leaving:
            with torch.inference_mode(), self.model.running():
                self.prefix.copy_out(most)
        return self.prefix.leaving > 0

    def cancel(self, sequence: Sequence) -> None:
        """End a sequence and take its pages back."""
        self.scheduler.cancel(sequence)

    def close(self) -> None:
        """Keep what prefixes are to be kept, and release the devices."""
        try:
            self.settle()
        finally:
            self.prefix.close()
            self.model.close()

    def _beside(self, work: int | None) -> int | None:
        """Tokens of prompts in the batch of those that decode, of a step that may do so much of prompts' work: as many
        as that, or none where a batch apart is to do more at once."""
        if work is None:
            return None
        tokens = work // self._layers
        if not self.model.interruptible:
            return max(LEAST, tokens) if work else 0
        whole = self._apart is None and tokens >= min(self.scheduler.pending, self.scheduler.chunk)
        return tokens if whole else 0

    def _go_apart(self, work: int | None, beside: int | None) -> int:
        """Some layers of prompts that run apart, all of those under way where `work` is None; returns the work done."""
        if self._apart is not None and self._apart.batch.sequences is not self.scheduler.apart:
            self._apart = None  # one of its sequences has ended, or made room
        done = 0
        while work is None or done < work:
            if self._apart is None and work is not None and beside == 0:
                # as many tokens as one layer may take at once: a batch has its price whatever its size
                batch = self.scheduler.batch_apart(min(work, self.scheduler.chunk))
                self._apart = None if batch is None else PromptPass(self.model, batch)
            if self._apart is None:
                break
            done += self._apart.advance(None if work is None else work - done, least=0 if done else 1)
            if self._apart.hidden is None:
                break
            self.scheduler.ran(self._apart.batch)
            self._sample(self._apart.batch, self._apart.hidden)
            self._apart = None
        return done

    def _run(self, batch: Scheduled) -> None:
        if not self.scheduler.keeps_states:
            slots = [(s.state_slot, s.spare_slot) for s in batch.sequences]
            self.model.copy_states([(own, copy) for own, copy in slots if own is not None and copy is not None])
        captured = self._captured(batch)
        if captured is not None:
            hidden, scores = captured
            self.scheduler.ran(batch)
            draw(self.model.sampler, batch.sequences, scores, batch.guesses)
            self._drawn(batch, hidden, batch.sequences)
        else:
            hidden = self.model.hidden(batch.step)
            self.scheduler.ran(batch)
            self._sample(batch, hidden)

    def _captured(self, batch: Scheduled) -> tuple[torch.Tensor, Scores] | None:
        if self.graphs is None or not batch.decodes:
            return None
        if not any(batch.guesses):
            return self.graphs.run(batch.step)
        # rows of one sequence would each take the state that the row before has yet to leave
        return None if self.model.states else self.graphs.run(one_by_one(batch.step))

    def _drawn(self, batch: Scheduled, hidden: torch.Tensor, ready: Iterable[Sequence]) -> None:
        """Settle what a step has brought, and have the drafter follow it."""
        ends = [sequence.cached for sequence in batch.sequences]
        lengths = batch.step.context_lens
        for sequence, guess, end, length in zip(batch.sequences, batch.guesses, ends, lengths, strict=True):
            if guess:
                tally = self.guesses[self.drafter.name if sequence.by_drafter and self.drafter else LOOKUP]
                tally.guessed += len(guess)
                tally.right += end - (length - len(guess))
        self.scheduler.checked(batch)
        self.prefix.commit(ready)
        if self.drafter is not None:
            self.drafter.follow(batch, hidden, ends)

    def _sample(self, batch: Scheduled, hidden: torch.Tensor) -> None:
        rows: list[int] = []
        ready: list[Sequence] = []
        guesses: list[tuple[int, ...]] = []
        for i, sequence in enumerate(batch.sequences):
            start, end = batch.step.q_start[i], batch.step.q_start[i + 1]
            if sequence.all_logits:
                span = hidden[start:end]
                if sequence.pool is not None:
                    sequence.pool.add(self.model.normed(span))
                else:
                    sequence.logits.append(self.model.logits(span))
                if sequence.pending == 0:
                    sequence.finish = Finish.LENGTH
                    if sequence.pool is not None and not sequence.pool.finite:
                        sequence.fail(
                            LogitsError("the model's hidden states are not numbers", "its weights are damaged")
                        )
            elif sequence.pending == 0:
                rows += range(end - 1 - len(batch.guesses[i]), end)
                ready.append(sequence)
                guesses.append(batch.guesses[i])
        if ready:
            last = hidden if len(rows) == hidden.shape[0] else hidden[rows]
            draw(self.model.sampler, ready, self.model.scores(last), guesses)
        self._drawn(batch, hidden, ready)
