"""The step loop: schedule a batch, run the model on it, sample, update the sequences."""

from __future__ import annotations

import torch

from ktcore.engine.decode_graph import DecodeGraphs
from ktcore.engine.pages import PageAllocator
from ktcore.engine.runner import LoadedModel
from ktcore.engine.sampler import draw
from ktcore.engine.scheduler import Scheduled, Scheduler
from ktcore.engine.sequence import Finish, Sequence
from ktcore.errors import RequestError
from ktcore.placement.memory import STATE_SLOTS, STEP_TOKENS


class Engine:
    """Serves sequences over one loaded model. It owns its pages and its scheduler; nothing is shared between engines.

    Args:
        context: tokens that fit into the KV cache, all running sequences together.
        page_size: tokens a page, as the plan negotiated it.
        chunk: most tokens of one step; longer prompts run in several.
        state_slots: most sequences at once, where the model has recurrent states.
        graphs: capture decode steps as device graphs where the model allows it (`LoadedModel.no_graphs` says why not).
    """

    def __init__(
        self,
        model: LoadedModel,
        context: int,
        page_size: int,
        chunk: int = STEP_TOKENS,
        state_slots: int = STATE_SLOTS,
        graphs: bool = True,
    ) -> None:
        self.model = model
        self.context = context
        pages = -(-context // page_size)
        captures = int(graphs and model.graph_device is not None)
        # captured steps need a page, and a state, that no sequence owns
        model.allocate_pages(pages + captures, page_size)
        slots = None
        if model.states:
            model.allocate_states(state_slots + captures)
            slots = PageAllocator(state_slots, page_size)
        self.graphs = None
        if captures:
            self.graphs = DecodeGraphs(model, pages, state_slots if model.states else None, page_size, pages)
        self.scheduler = Scheduler(PageAllocator(pages, page_size), chunk, slots)

    def check(self, sequence: Sequence) -> None:
        """Refuse what can never run; any thread may ask.

        Raises:
            RequestError: the prompt is empty or does not fit into the context.
        """
        if not sequence.tokens:
            raise RequestError("the prompt is empty: there is no token to continue from")
        room = self.context - sequence.prompt_len
        # an answer needs at least one place; logits of the prompt alone need none
        if room < 0 or (room == 0 and sequence.max_new_tokens > 0):
            raise RequestError(
                f"the prompt has {sequence.prompt_len} tokens, the context holds {self.context}",
                "shorten it, or load the model with a larger context= (--context)",
            )

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
        batch = self.scheduler.next_batch()
        if batch is None:
            return False
        with torch.inference_mode(), self.model.running():
            scores = self.graphs.scores(batch.step) if self.graphs is not None and batch.decodes else None
            if scores is not None:
                self.scheduler.ran(batch)
                draw(self.model.sampler, batch.sequences, scores)
            else:
                hidden = self.model.hidden(batch.step)
                self.scheduler.ran(batch)
                self._sample(batch, hidden)
        self.scheduler.retire()
        return True

    def cancel(self, sequence: Sequence) -> None:
        """End a sequence and take its pages back."""
        self.scheduler.cancel(sequence)

    def _sample(self, batch: Scheduled, hidden: torch.Tensor) -> None:
        rows: list[int] = []
        ready: list[Sequence] = []
        for i, sequence in enumerate(batch.sequences):
            if sequence.all_logits:
                span = hidden[batch.step.q_start[i] : batch.step.q_start[i + 1]]
                if sequence.pool is not None:
                    sequence.pool.add(self.model.normed(span))
                else:
                    sequence.logits.append(self.model.logits(span))
                if sequence.pending == 0:
                    sequence.finish = Finish.LENGTH
            elif sequence.pending == 0:
                rows.append(batch.step.q_start[i + 1] - 1)
                ready.append(sequence)
        if not ready:
            return
        last = hidden if len(rows) == hidden.shape[0] else hidden[rows]
        draw(self.model.sampler, ready, self.model.scores(last))
