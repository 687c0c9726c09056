"""Which experts an accelerator should hold: a policy that sees what tokens choose and says what to copy. A pure object:
nothing in the engine uses it yet, `benchmarks/expert_cache.py` replays traces through it.

Rates are counts that decay. How quickly they should decay depends on the traffic: rates of a long past are exact where
topics stay, those of a short one follow where they change. So several are kept, each with the experts that it would
hold, and whichever would have hit most of late decides.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

HALF_LIVES = (32, 128, 512, 2048)
"""Steps after which a choice counts half."""
EVERY = 8
"""Steps between two looks at who should move."""
REMEMBERED = 0.98
"""Of the share of hits that decides between half-lives, a step later."""
BURST = 64
"""Steps whose copies may be saved up."""


@dataclass(frozen=True)
class Move:
    """An expert to copy to the accelerator.

    Attributes:
        expert: number of (layer, expert), layer * experts + expert.
        instead_of: the one whose slot it takes, in the same numbering; None: a free slot.
    """

    expert: int
    instead_of: int | None


class Residence:
    """A pool of slots that all experts of a model share, a slot an expert of a layer.

    Args:
        layers, experts: of the model; those of a layer that has none are never chosen.
        slots: experts that the accelerator holds.
        copies: most experts copied for each choice of a token (0.05: one for twenty), in the mean.
        margin: standard deviations by which a candidate's rate must exceed the coldest resident's.
        known: rates to begin with, float [layers, experts], of an earlier run.

    Raises:
        ValueError: numbers that make no sense, or rates of another shape.
    """

    def __init__(
        self,
        layers: int,
        experts: int,
        slots: int,
        *,
        copies: float = 0.05,
        margin: float = 1.0,
        known: npt.NDArray[np.floating] | None = None,
    ) -> None:
        if layers < 1 or experts < 1 or not 0 <= slots <= layers * experts:
            raise ValueError(f"{slots} slots for {layers} layers of {experts} experts")
        if copies < 0 or margin < 0:
            raise ValueError(f"copies {copies} and margin {margin} must not be below 0")
        self._shape, self._slots, self._copies, self._margin = (layers, experts), slots, copies, margin
        self._decay = np.array([0.5 ** (1 / half) for half in HALF_LIVES])
        count = layers * experts
        self._rates = np.zeros((len(HALF_LIVES), count))
        self._weight = np.zeros(len(HALF_LIVES))  # what the rates would be of an expert that every step chose once
        self._would = np.zeros((len(HALF_LIVES), count), dtype=bool)
        self._score = np.zeros(len(HALF_LIVES))
        self._resident = np.zeros(count, dtype=bool)
        self._saved = 0.0
        self._steps = 0
        if known is not None:
            if known.shape != self._shape or not np.isfinite(known).all() or (known < 0).any():
                raise ValueError(
                    f"known rates {list(known.shape)} are no rates of {layers} layers of {experts} experts"
                )
            self._rates[:] = known.reshape(1, -1)
            self._weight[:] = 1.0
            self._look()

    @property
    def rates(self) -> npt.NDArray[np.float64]:
        """Choices a step by layer and expert, [layers, experts], by the half-life that does best now."""
        best = self._best()
        found: npt.NDArray[np.float64] = self._rates[best] / max(self._weight[best], 1e-12)
        return found.reshape(self._shape)

    @property
    def resident(self) -> npt.NDArray[np.bool_]:
        """Experts that have a slot, [layers, experts]."""
        found: npt.NDArray[np.bool_] = self._resident.reshape(self._shape).copy()
        return found

    def see(self, counts: npt.NDArray[np.integer]) -> None:
        """One step's choices.

        Args:
            counts: tokens that chose each expert, [layers, experts].
        """
        flat = counts.reshape(-1)
        total = int(flat.sum())
        if total and self._steps >= EVERY:
            self._score = REMEMBERED * self._score + (1 - REMEMBERED) * (self._would @ flat) / total
        self._rates = self._rates * self._decay[:, None] + (1 - self._decay)[:, None] * flat
        self._weight = self._weight * self._decay + (1 - self._decay)
        allowed = self._copies * total
        self._saved = min(self._saved + allowed, BURST * allowed) if total else self._saved
        self._steps += 1

    def moves(self) -> Sequence[Move]:
        """What to copy before the next step, hottest first. The policy takes it for done; `undo` says what was not."""
        if self._steps % EVERY or not self._slots:
            return ()
        self._look()
        most = int(self._saved)
        if not most:
            return ()
        rates = self.rates.reshape(-1)
        hot = _first(np.where(self._resident, -1.0, rates), most)
        hot = hot[rates[hot] > 0]
        held = int(self._resident.sum())
        free = self._slots - held
        moved = [Move(int(e), None) for e in hot[:free]]
        hot = hot[free : free + held]
        cold = _first(np.where(self._resident, -rates, -np.inf), len(hot))
        # of a count's estimate over so many steps
        spread = np.sqrt((rates[hot] + rates[cold]) * (1 - self._decay[self._best()]) / 2)
        worth = rates[hot] > rates[cold] + self._margin * spread
        stop = len(worth) if worth.all() else int(np.argmin(worth))
        moved += [Move(int(h), int(c)) for h, c in zip(hot[:stop], cold[:stop], strict=True)]
        for move in moved:
            self._resident[move.expert] = True
            if move.instead_of is not None:
                self._resident[move.instead_of] = False
        self._saved -= len(moved)
        return moved

    def undo(self, move: Move) -> None:
        """A copy that failed, or was not made: the expert has no slot, and neither has the one before it."""
        self._resident[move.expert] = False

    def shrink(self, slots: int) -> Sequence[int]:
        """Give slots back until `slots` are left; the experts that lose theirs, coldest first."""
        if not 0 <= slots <= self._slots:
            raise ValueError(f"{slots} slots are no part of {self._slots}")
        self._slots = slots
        over = int(self._resident.sum()) - slots
        lost = _first(np.where(self._resident, -self.rates.reshape(-1), -np.inf), max(over, 0))
        self._resident[lost] = False
        return [int(e) for e in lost]

    def _look(self) -> None:
        """What each half-life would hold."""
        for i, rates in enumerate(self._rates):
            self._would[i] = False
            self._would[i, _first(rates, self._slots)] = True

    def _best(self) -> int:
        # the longest of equals: its rates are the most exact
        return len(self._score) - 1 - int(np.argmax(self._score[::-1]))


def _first(values: npt.NDArray[np.floating], count: int) -> npt.NDArray[np.intp]:
    """Places of the `count` largest values, largest first."""
    count = min(count, len(values))
    if not count:
        return np.zeros(0, dtype=np.intp)
    some = np.argpartition(-values, count - 1)[:count]
    return some[np.argsort(-values[some], kind="stable")]
