"""Keeps steps short while answers are under way: how many tokens of prompts a step may take beside them."""

from __future__ import annotations

LEAST = 16
"""Tokens of prompts that every step may take."""
_NEW = 0.25
_CAUTION = 0.8
"""A step's time varies: aim this much below the bound."""


class Pace:
    """Learns from the steps what decoding takes and what a prompt's token adds.

    Args:
        stretch: how many times as long as a step that only decodes one with prompts may be.
    """

    def __init__(self, stretch: float) -> None:
        self.stretch = stretch
        self._decode: dict[int, float] = {}
        self._token: float | None = None

    def most(self, decoding: int) -> int | None:
        """Tokens of prompts for a step in which so many sequences decode; None where there is no bound."""
        if not decoding:
            return None
        if self._token is None or not self._decode:
            return 4 * LEAST
        room = (self.stretch * _CAUTION - 1) * self._expected(decoding)
        return max(LEAST, int(room / max(self._token, 1e-9)))

    def note(self, decoding: int, prompt: int, seconds: float) -> None:
        """A step took so long."""
        if decoding and not prompt:
            old = self._decode.get(decoding, seconds)
            # a step that had to wait for something else must not count for long
            self._decode[decoding] = old + _NEW * (min(seconds, 2 * old) - old)
        elif prompt >= LEAST:
            extra = seconds - (self._expected(decoding) if decoding and self._decode else 0.0)
            cost = max(extra, 0.0) / prompt
            self._token = cost if self._token is None else self._token + _NEW * (cost - self._token)

    def _expected(self, decoding: int) -> float:
        near = min(self._decode, key=lambda n: abs(n - decoding))
        return self._decode[near]
