"""A batch of prompts on its way through the layers, some of them at a time: steps that decode come between.

So a prompt takes chunks that are worth reading the weights and the cache for, and still holds nobody up for longer than
a few layers take.
"""

from __future__ import annotations

import torch

from ktcore.engine.schedule.scheduler import Scheduled
from ktcore.engine.step.runner import LoadedModel


class PromptPass:
    """One batch.

    Attributes:
        tokens: of the batch.
        hidden: last hidden states float32 [tokens, hidden], once it is through.
    """

    def __init__(self, model: LoadedModel, batch: Scheduled) -> None:
        self.batch = batch
        self.tokens = batch.step.tokens
        self.hidden: torch.Tensor | None = None
        self._model = model
        self._x = model.embed(batch.step.token_ids)
        self._at = 0
        self._due = 0.0

    def advance(self, work: int | None, least: int = 1) -> int:
        """Run as many layers as `work`, in tokens times layers, allows, but `least`; None: all that are left.

        What is left of `work` counts for the next call. Returns the work that was done.
        """
        left = len(self._model.layers) - self._at
        layers = left
        if work is not None:
            self._due = max(0.0, self._due) + work / self.tokens
            layers = min(left, max(least, int(self._due)))
            self._due -= layers
        end = self._at + layers
        self._x = self._model.through_layers(self._x, self.batch.step, self._at, end)
        self._at = end
        if layers == left:
            self.hidden = self._x
        return layers * self.tokens
