"""One vector for a whole text: the mean of its hidden states, or the last of them."""

from __future__ import annotations

import torch

MEAN, LAST = "mean", "last"
KINDS = (MEAN, LAST)


class Pool:
    """Takes a text's hidden states in pieces, and keeps no more than two vectors of them.

    Args:
        kind: "mean" or "last".
    """

    def __init__(self, kind: str = MEAN) -> None:
        self._kind = kind
        self._sum: torch.Tensor | None = None
        self._last: torch.Tensor | None = None
        self._count = 0

    def add(self, states: torch.Tensor) -> None:
        """More states, float32 [tokens, hidden] on the CPU."""
        total = states.double().sum(0)
        self._sum = total if self._sum is None else self._sum + total
        self._last = states[-1].clone()
        self._count += len(states)

    @property
    def finite(self) -> bool:
        """Whether all states so far were numbers."""
        return self._sum is None or bool(self._sum.isfinite().all())

    def vector(self) -> torch.Tensor:
        """Float32 [hidden] of unit length; zero where all states are."""
        if self._sum is None or self._last is None:
            raise ValueError("no states were added")
        pooled = self._last.double() if self._kind == LAST else self._sum / self._count
        return torch.nn.functional.normalize(pooled, dim=0).float()
