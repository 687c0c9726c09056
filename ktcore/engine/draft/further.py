"""Drafts of the model's own layer for further tokens (multi-token prediction), over pages that all its caches share.

The layer sees each token of a text beside the last hidden state of the token before it, so it follows every step; the
slot of a position in its cache holds what the token *behind* that position has added.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq

import torch

from ktcore.engine.schedule.batch import Span, step_batch
from ktcore.engine.schedule.scheduler import Scheduled, Scheduler
from ktcore.engine.schedule.sequence import Sequence
from ktcore.engine.step.runner import LoadedModel
from ktcore.engine.step.scores import Scores


class FurtherDrafter:
    """Proposes the likeliest tokens, one after another.

    Args:
        model: loaded with its further layer, whose caches are among the model's own.
        most: tokens proposed at once; from the second one on the layer is fed with what it gave itself.
    """

    name = "mtp"

    def __init__(self, model: LoadedModel, scheduler: Scheduler, most: int) -> None:
        self.most = most
        self._model = model
        self._scheduler = scheduler

    def follow(self, batch: Scheduled, hidden: torch.Tensor, ends: Seq[int]) -> None:
        """Run the tokens behind those of a step, and propose what follows the sequences that draw next.

        Args:
            hidden: the step's last hidden states, float32 [T, hidden].
            ends: of each sequence the position behind its last right token in the step.
        """
        spans, rows = self._spans(batch, ends)
        if not spans:
            return
        states = self._states(hidden if len(rows) == len(hidden) else hidden[rows], spans, first=True)
        last = -1
        drafting: list[tuple[Sequence, int, int]] = []
        for span in spans:
            last += len(span.ids)
            room = self._room(span.sequence)
            if room:
                drafting.append((span.sequence, room, last))
        if drafting:
            self._propose([s for s, _, _ in drafting], [n for _, n, _ in drafting], states[[at for *_, at in drafting]])

    def _spans(self, batch: Scheduled, ends: Seq[int]) -> tuple[list[Span], list[int]]:
        """The tokens behind a step's, and the rows of the states that belong to them."""
        spans: list[Span] = []
        rows: list[int] = []
        for i, (sequence, ran) in enumerate(zip(batch.sequences, ends, strict=True)):
            row = batch.step.q_start[i]
            begin = int(batch.step.positions[row])
            # of an answer that failed there is no token behind; what went back runs again with the next step
            end = min(ran, sequence.cached, len(sequence.tokens) - 1)
            if not sequence.all_logits and end > begin:
                spans.append(Span(sequence, sequence.tokens[begin + 1 : end + 1], begin))
                rows += range(row, row + end - begin)
        return spans, rows

    def _room(self, sequence: Sequence) -> int:
        """Tokens to propose for a sequence; 0 where it draws none with the next step, or wants none."""
        if sequence.drafts is None or sequence.finish is not None or sequence.rewound or not sequence.decodes:
            return 0
        return self._scheduler.hold_guesses(sequence, sequence.drafts.most)

    def _propose(self, sequences: list[Sequence], rooms: list[int], states: torch.Tensor) -> None:
        found: list[list[int]] = [[] for _ in sequences]
        going = list(range(len(sequences)))
        for depth in range(max(rooms)):
            scores = Scores(self._model.head(states), self._model.devices.check)
            for at, (token, _) in zip(going, scores.likeliest(), strict=True):
                found[at].append(token)
            kept = [row for row, at in enumerate(going) if rooms[at] > depth + 1]
            going = [going[row] for row in kept]
            if not going:
                break
            spans = [Span(sequences[at], found[at][-1:], sequences[at].cached + depth) for at in going]
            states = self._states(states if len(kept) == len(states) else states[kept], spans, first=False)
        for sequence, ids in zip(sequences, found, strict=True):
            assert sequence.drafts is not None
            sequence.drafts.propose(ids, len(sequence.tokens))

    def _states(self, states: torch.Tensor, spans: list[Span], first: bool) -> torch.Tensor:
        normed = self._model.norm(states) if first else states
        return self._model.further_states(normed, step_batch(spans, self._scheduler.pages.page_size))
