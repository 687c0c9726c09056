"""What a MoE branch calls for its routed experts when they may live on another device: submit now, wait later."""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

import torch

Ticket = Any
"""An outstanding submission; belongs to the experts that gave it."""


@runtime_checkable
class SubmittedExperts(Protocol):
    """Routed experts that run beside the caller's stream. Every submission is waited for once, in order."""

    def submit(self, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> Ticket:
        """Start on x [T, hidden], ids int64 [T, k], weights float32 [T, k]; does not block the host thread."""
        ...

    def wait(self, ticket: Ticket) -> torch.Tensor:
        """The result float32 [T, hidden] in stream order; later work of the stream sees it complete."""
        ...


def submit_experts(experts: Any, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> Ticket:
    """Submit to experts of either kind; those that live on the caller's own device run at once."""
    return experts.submit(x, ids, weights) if isinstance(experts, SubmittedExperts) else experts(x, ids, weights)


def wait_experts(experts: Any, ticket: Ticket) -> torch.Tensor:
    """The result of `submit_experts`."""
    return experts.wait(ticket) if isinstance(experts, SubmittedExperts) else ticket
