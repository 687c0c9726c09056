"""What a backend sees of packed weights on disk: it asks for a part, and gives what packs it when it is not there."""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ktcore.weights.ref import Weight

Bytes = npt.NDArray[np.uint8]
Fill = Callable[[int], Bytes]
"""Packs one piece: its index -> its bytes."""


@dataclass(frozen=True)
class Part:
    """Packed weights that an implementation loads at once.

    Attributes:
        what: the node and role, for messages.
        layout: name and version of the layout, "acme.tiles/3"; a change of the layout is a change of the version.
        kind: which of the layout's forms the weights are in, shapes and formats included: all that must agree.
        weights: the weights that it is packed from.
        pieces: equal parts that are packed one at a time (experts), each `nbytes` long.
    """

    what: str
    layout: str
    kind: str
    weights: Sequence[Weight]
    pieces: int
    nbytes: int

    @property
    def key(self) -> str:
        """The same for the same weights in the same form, whatever the layout's version."""
        named = [self.layout.partition("/")[0], self.kind, [w.identity for w in self.weights]]
        return hashlib.sha256(json.dumps(named).encode()).hexdigest()[:32]


class PackedParts(ABC):
    """Packed weights of one model on disk.

    Attributes:
        complete: all that is kept here has been packed; the model's own files are hardly read any more.
    """

    complete: bool = False

    @abstractmethod
    def get(self, part: Part, fill: Fill) -> Bytes | None:
        """The part, mapped: read-only uint8 [pieces, nbytes], aligned to pages, valid as long as it is referenced.

        None: it is not kept here, and the caller packs it into memory of its own.

        Args:
            fill: packs piece i; called only for pieces that are to be written now, in order. Must read nothing of the
                weights outside of it.

        Raises:
            CheckpointError: the stored part is damaged or in another version of the layout, or it cannot be written.
        """

    def populate(self, room: int) -> None:  # noqa: B027, writers have nothing to map
        """Have pages of parts that are asked for from now on mapped ahead of their use, if all fit in `room` bytes."""
