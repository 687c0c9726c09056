"""Ways to call one layer's routed experts in parts: by where they live, by when their sum is needed, by weight."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ktcore.backend.experts import Ticket, submit_experts, wait_experts


class SplitExperts:
    """Some experts on the caller's own device, the others elsewhere; one sum (`SubmittedExperts`).

    Both halves number their own experts from 0 and ignore negative ids, so a token's other experts add nothing.

    Args:
        near: module on the caller's device, holding the experts `resident` in that order.
        far: the experts that are left, in ascending order; None when all are near.
        resident: ids of the near ones.
        experts: how many there are in all.
    """

    def __init__(self, near: Any, far: Any, resident: Sequence[int], experts: int, device: torch.device) -> None:
        self._near = near
        self._far = far
        others = [e for e in range(experts) if e not in set(resident)]
        self._near_ids = _numbering(resident, experts, device)
        self._far_ids = _numbering(others, experts, device)

    def submit(self, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> Ticket:
        """Start the far half, then run the near one beside it."""
        ticket = None if self._far is None else submit_experts(self._far, x, _renumber(ids, self._far_ids), weights)
        return ticket, self._near(x, _renumber(ids, self._near_ids), weights)

    def wait(self, ticket: Ticket) -> torch.Tensor:
        """The sum of both halves."""
        far, near = ticket
        total: torch.Tensor = near if self._far is None else near + wait_experts(self._far, far)
        return total

    def __call__(self, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """Submit and wait."""
        return self.wait(self.submit(x, ids, weights))


class DeferralChain:
    """What the layers of one engine owe to the next: at most one outstanding ticket.

    Attributes:
        used: some layers do.
    """

    def __init__(self) -> None:
        self.used = False
        self.owed: tuple[Any, Ticket] | None = None

    def collect(self) -> torch.Tensor | None:
        """The sum that the layer before left behind, if it did."""
        if self.owed is None:
            return None
        (experts, ticket), self.owed = self.owed, None
        return wait_experts(experts, ticket)


class DeferredExperts:
    """Lets the lowest-weighted experts of each token land one layer late (`SubmittedExperts`).

    The layer's sum holds its own first `top_k - defer` experts and what the layer before deferred; the last layer
    waits for all. The residual stream gets every expert's output, the deferred ones after one more attention
    (KTransformers' expert deferral).

    Args:
        now, later: two callers of the same experts with buffers of their own, since both are outstanding at once.
        defer: experts a token that may be late.
        last: this is the last layer with experts.
    """

    def __init__(self, now: Any, later: Any, chain: DeferralChain, defer: int, last: bool) -> None:
        self._now = now
        self._later = later
        self._chain = chain
        chain.used = True
        self._defer = defer
        self._last = last

    def submit(self, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> Ticket:
        """Start both halves, the urgent one first."""
        if self._last:
            return submit_experts(self._now, x, ids, weights), None
        rank = _rank(weights)
        urgent = rank < ids.shape[-1] - self._defer
        first = submit_experts(self._now, x, ids.masked_fill(~urgent, -1), weights)
        return first, submit_experts(self._later, x, ids.masked_fill(urgent, -1), weights)

    def wait(self, ticket: Ticket) -> torch.Tensor:
        """This layer's urgent experts and the late ones of the layer before."""
        first, second = ticket
        out: torch.Tensor = wait_experts(self._now, first)
        late = self._chain.collect()
        if second is not None:
            self._chain.owed = (self._later, second)
        return out if late is None else out + late

    def __call__(self, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """Submit and wait."""
        return self.wait(self.submit(x, ids, weights))


class ReducedRouter:
    """A router whose weakest choices are dropped: their ids become -1.

    Args:
        keep: at most so many experts a token; 0 keeps all.
        threshold: drop experts whose weight is below this share of the token's largest; 0 drops none.
    """

    def __init__(self, router: Any, keep: int = 0, threshold: float = 0.0) -> None:
        self._router = router
        self._keep = keep
        self._threshold = threshold

    def __call__(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        ids, weights = self._router(x)
        dropped = weights < self._threshold * weights.amax(-1, keepdim=True)
        if self._keep:
            rank = _rank(weights)
            dropped |= rank >= self._keep
        return ids.masked_fill(dropped, -1), weights


def _numbering(ids: Sequence[int], experts: int, device: torch.device) -> torch.Tensor:
    """int64 [experts + 1]: each expert's number among `ids`, -1 for the others and, at the end, for no expert."""
    table = torch.full((experts + 1,), -1, dtype=torch.int64)
    for number, expert in enumerate(ids):
        table[expert] = number
    return table.to(device)


def _renumber(ids: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    # -1 picks the table's last entry, which is -1 again
    return table[ids]


def _rank(weights: torch.Tensor) -> torch.Tensor:
    """Place of each choice by weight, 0 for the largest; equal ones in order."""
    return weights.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)
