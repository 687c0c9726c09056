"""What a drafter is: it follows the steps of an engine, and proposes next tokens."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import Protocol

import torch

from ktcore.engine.schedule.scheduler import Scheduled, Scheduler
from ktcore.engine.step.runner import LoadedModel

LOOKUP = "lookup"
"""What prompt lookup is called among drafters, in counts."""


class Drafter(Protocol):
    """Attributes:
    name: in counts, "mtp" say.
    most: tokens that it proposes at once.
    """

    name: str
    most: int

    def follow(self, batch: Scheduled, hidden: torch.Tensor, ends: Seq[int]) -> None:
        """Take note of a step that has run and drawn, and propose for the sequences that draw with the next one.

        Args:
            hidden: the step's last hidden states, float32 [T, hidden].
            ends: of each sequence the position behind its last right token in the step.
        """
        ...


MakeDrafter = Callable[[LoadedModel, Scheduler], Drafter]
"""Makes the drafter of an engine, whose memory is allocated already."""


@dataclass(frozen=True)
class Drafting:
    """What drafts for a model that is being loaded.

    Attributes:
        make: makes the engine's drafter.
        caches: the model that drafts, whose caches want pages beside the target's; None where it is the target itself.
        identity: names it, for prefixes on disk.
    """

    make: MakeDrafter
    caches: LoadedModel | None = None
    identity: str = ""


@dataclass
class Tally:
    """How many tokens were guessed, and how many of them were right."""

    guessed: int = 0
    right: int = 0
