"""What the prefix cache notes of one sequence."""

from __future__ import annotations

from concurrent.futures import Future
from dataclasses import dataclass, field

import torch


@dataclass
class PrefixState:
    """Attributes:
    digests: names of the sequence's full pages, as far as they were needed.
    named: how many of its pages are registered under their names.
    fetching: contents that are read from disk.
    borders: positions behind which the recurrent states are wanted; a step ends there.
    snapshots: position -> name and content of the states there, until the step that made them is known to be good.
    reused: tokens of the prompt that were not computed, when it was admitted first.
    """

    digests: list[bytes] = field(default_factory=list)
    named: int = 0
    fetching: Future[dict[bytes, torch.Tensor]] | None = None
    borders: set[int] = field(default_factory=set)
    snapshots: dict[int, tuple[bytes, torch.Tensor]] = field(default_factory=dict)
    reused: int | None = None
