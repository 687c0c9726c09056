"""Drafts of a smaller model of the same vocabulary, over the same pages: its caches hold them beside the target's."""

from __future__ import annotations

from collections.abc import Sequence as Seq

import torch

from ktcore.engine.schedule.batch import Span, step_batch
from ktcore.engine.schedule.scheduler import Scheduled, Scheduler
from ktcore.engine.schedule.sequence import Sequence
from ktcore.engine.step.runner import LoadedModel
from ktcore.engine.step.scores import Scores


class PairDrafter:
    """Proposes the tokens that the smaller model finds likeliest, one after another.

    Args:
        model: the smaller one, on devices of the target; without recurrent states.
        most: tokens proposed at once.
        vocab: of the target; the smaller model's head may be padded beyond it.
    """

    name = "model"

    def __init__(self, model: LoadedModel, scheduler: Scheduler, most: int, vocab: int) -> None:
        self.most = most
        self._model = model
        self._scheduler = scheduler
        self._vocab = vocab

    def follow(self, batch: Scheduled, hidden: torch.Tensor, ends: Seq[int]) -> None:
        """Run what a step has brought, and propose what follows the sequences that draw next.

        Args:
            hidden: not read.
            ends: not read: right tokens are those that a sequence has.
        """
        spans: list[Span] = []
        drafting: list[tuple[Sequence, int, int]] = []
        last = -1
        for sequence in batch.sequences:
            if sequence.all_logits:
                continue
            room, begin = self._room(sequence), self._kept(sequence)
            # with the token that was drawn last only where it has a place, and something is proposed behind it
            end = len(sequence.tokens) if room else min(sequence.cached, len(sequence.tokens))
            if end > begin:
                spans.append(Span(sequence, sequence.tokens[begin:end], begin))
                last += end - begin
                sequence.kept = end
                if room:
                    drafting.append((sequence, room, last))
        if not spans:
            return
        states = self._model.hidden(step_batch(spans, self._scheduler.pages.page_size))
        if drafting:
            self._propose([s for s, _, _ in drafting], [n for _, n, _ in drafting], states[[at for *_, at in drafting]])

    def _kept(self, sequence: Sequence) -> int:
        """How many of a sequence's tokens have keys and values, drafts that proved right included."""
        if sequence.drafts is not None:
            for token in sequence.drafts.ids[:-1]:
                if sequence.kept >= len(sequence.tokens) or sequence.tokens[sequence.kept] != token:
                    break
                sequence.kept += 1
            sequence.drafts.ids = []
        return sequence.kept

    def _room(self, sequence: Sequence) -> int:
        if sequence.drafts is None or sequence.finish is not None or sequence.rewound or not sequence.decodes:
            return 0
        return self._scheduler.hold_guesses(sequence, sequence.drafts.most)

    def _propose(self, sequences: list[Sequence], rooms: list[int], states: torch.Tensor) -> None:
        found: list[list[int]] = [[] for _ in sequences]
        going = list(range(len(sequences)))
        for depth in range(max(rooms)):
            for at, token in zip(going, self._likeliest(states), strict=True):
                found[at].append(token)
            going = [at for at in going if rooms[at] > depth + 1]
            if not going:
                break
            spans = [Span(sequences[at], found[at][-1:], len(sequences[at].tokens) + depth) for at in going]
            states = self._model.hidden(step_batch(spans, self._scheduler.pages.page_size))
        for sequence, ids in zip(sequences, found, strict=True):
            assert sequence.drafts is not None
            sequence.drafts.propose(ids, len(sequence.tokens))

    def _likeliest(self, states: torch.Tensor) -> list[int]:
        logits = self._model.head(self._model.norm(states))[:, : self._vocab]
        return [token for token, _ in Scores(logits, self._model.devices.check).likeliest()]
