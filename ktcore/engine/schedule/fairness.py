"""The queue of sequences that wait: fair among users, by tokens served, and first come first served within one.

After "Fairness in Serving Large Language Models" (Sheng et al., OSDI 2024, arXiv 2401.00588): each user has a virtual
counter of tokens served, whoever has the least goes first, and a user who was away comes back level with the least of
those who are there, so that nobody saves up a claim.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator

from ktcore.engine.schedule.sequence import Sequence

DRAWN_WEIGHT = 2
"""A drawn token counts as so many of a prompt's (the paper's weights)."""
USERS = 4096
"""Users whose counters are remembered while they have nothing to do."""


class FairQueue:
    """Sequences that wait for admission."""

    def __init__(self) -> None:
        self._waiting: list[Sequence] = []
        self._returned: list[Sequence] = []
        self._served: OrderedDict[str, float] = OrderedDict()
        self._present: dict[str, int] = {}

    def __len__(self) -> int:
        return len(self._waiting) + len(self._returned)

    def __contains__(self, sequence: Sequence) -> bool:
        return sequence in self._waiting or sequence in self._returned

    def __iter__(self) -> Iterator[Sequence]:
        """In the order of admission: those that had to make room first, then by their users' counters."""
        yield from sorted(self._returned, key=lambda s: s.arrival)
        yield from sorted(self._waiting, key=self.rank)

    def rank(self, sequence: Sequence) -> tuple[float, int]:
        """Who goes first among sequences that wait for the same thing: the lesser."""
        return self._served.get(sequence.user, 0.0), sequence.arrival

    def add(self, sequence: Sequence) -> None:
        """A sequence arrives."""
        user = sequence.user
        if user not in self._present:
            level = min((self._served.get(u, 0.0) for u in self._present), default=0.0)
            self._served[user] = max(self._served.get(user, 0.0), level)
        self._served.move_to_end(user)
        self._present[user] = self._present.get(user, 0) + 1
        self._waiting.append(sequence)
        self._forget_absent()

    def put_back(self, sequence: Sequence) -> None:
        """A sequence that had to make room comes before all that were never admitted."""
        self._returned.append(sequence)

    def take(self, sequence: Sequence) -> None:
        """A sequence is admitted, or cancelled while it waits."""
        (self._returned if sequence in self._returned else self._waiting).remove(sequence)

    def ended(self, sequence: Sequence) -> None:
        """A sequence that was added is gone for good."""
        self._present[sequence.user] -= 1
        if not self._present[sequence.user]:
            del self._present[sequence.user]

    def charge(self, sequence: Sequence, tokens: int, drawn: bool) -> None:
        """Count tokens that a step computed for a sequence's user."""
        weight = DRAWN_WEIGHT if drawn else 1
        self._served[sequence.user] = self._served.get(sequence.user, 0.0) + weight * tokens

    def _forget_absent(self) -> None:
        for user in list(self._served):
            if len(self._served) <= USERS:
                return
            if user not in self._present:
                del self._served[user]
