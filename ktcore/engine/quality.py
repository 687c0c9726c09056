"""What a faster way of running a model costs in quality: divergence of its predictions from the full model's."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Divergence:
    """How far predictions are from those they should equal.

    Attributes:
        mean_kl: mean Kullback-Leibler divergence from the full model, in nats a position.
        max_kl: the largest of a position.
        top1: share of positions whose likeliest token is the same.
        positions: how many were compared.
    """

    mean_kl: float
    max_kl: float
    top1: float
    positions: int


def divergence(full: torch.Tensor, other: torch.Tensor, rows: int = 64) -> Divergence:
    """Compare logits [positions, vocab] of the full model with another's, `rows` at a time to bound memory.

    KL(p || q) = sum p (log p - log q), in float64.
    """
    if full.shape != other.shape or full.shape[0] == 0:
        raise ValueError(f"logits of shapes {list(full.shape)} and {list(other.shape)} cannot be compared")
    parts, same = [], 0
    for start in range(0, full.shape[0], rows):
        p = full[start : start + rows].double().log_softmax(-1)
        q = other[start : start + rows].double().log_softmax(-1)
        parts.append((p.exp() * (p - q)).sum(-1))
        same += int((p.argmax(-1) == q.argmax(-1)).sum())
    kl = torch.cat(parts)
    return Divergence(kl.mean().item(), kl.max().item(), same / full.shape[0], full.shape[0])
