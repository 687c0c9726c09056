"""Keeps steps short while answers are under way: how much of prompts' work a step may do beside them."""

from __future__ import annotations

STRETCH = 3.0
"""How many times as long as a step that only decodes one with prompts may be, where nobody says."""
FIRST = 16
"""Tokens of prompts to begin with."""
LEAST = 1
"""Of prompts' work a step may always do so much, so that they come to an end."""
AGE = 256
"""Steps after which the time of a step without prompts is measured again, at the cost of one such step."""
_AIM = 0.7
"""Steps vary: aim so much below the bound. On a quiet machine nine in ten are then within it."""
_NEW = 0.25


class Pace:
    """Learns from the steps, as a controller does: whatever makes a step too long makes the next one smaller.

    Args:
        stretch: how many times as long as a step that only decodes one with prompts may be.
        layers: of the model; work is counted in tokens times layers.
    """

    def __init__(self, stretch: float, layers: int = 1) -> None:
        self.stretch = stretch
        self._decode: dict[int, float] = {}
        self._measured: dict[int, int] = {}
        self._steps = 0
        self._limit = float(FIRST * layers)

    def most(self, decoding: int) -> int | None:
        """Work of prompts for a step in which so many sequences decode; None where there is no bound."""
        if not decoding:
            return None
        near = self._near(decoding)
        if near is None or abs(near - decoding) > max(1, decoding // 4) or self._steps - self._measured[near] > AGE:
            return 0
        return max(LEAST, int(self._limit))

    def note(self, decoding: int, prompt: int, seconds: float) -> None:
        """A step took so long, in which so many sequences decoded beside so much of prompts' work."""
        self._steps += 1
        if not decoding:
            return
        if not prompt:
            old = self._decode.get(decoding, seconds)
            # a step that had to wait for something else must not count for long
            self._decode[decoding] = old + _NEW * (min(seconds, 2 * old) - old)
            self._measured[decoding] = self._steps
            return
        near = self._near(decoding)
        if near is None:
            return
        ratio = self.stretch * _AIM * self._decode[near] / seconds
        # what did not use its limit says nothing against a larger one, nor for it
        if ratio < 1:
            self._limit = max(prompt * max(ratio, 0.5), LEAST)
        elif prompt >= int(self._limit):
            # from the limit, not from the whole tokens it allowed: small ones would never grow
            self._limit = min(self._limit * min(ratio, 1.25), 1e7)

    def _near(self, decoding: int) -> int | None:
        return min(self._decode, key=lambda n: abs(n - decoding), default=None)
