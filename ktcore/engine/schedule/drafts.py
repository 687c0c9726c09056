"""What a drafter has proposed for one sequence, until the next step takes it."""

from __future__ import annotations


class Drafts:
    """Proposals behind one sequence's last token.

    Attributes:
        most: tokens proposed at once.
        ids: what was proposed last.
    """

    def __init__(self, most: int) -> None:
        self.most = most
        self.ids: list[int] = []
        self._behind = -1

    def propose(self, ids: list[int], behind: int) -> None:
        """Take proposals for what follows the first `behind` tokens of the sequence."""
        self.ids, self._behind = ids, behind

    def guess(self, tokens: list[int], most: int) -> list[int]:
        """At most `most` of them, where they are for what follows `tokens`."""
        return self.ids[:most] if len(tokens) == self._behind else []
