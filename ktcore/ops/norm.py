"""RMSNorm (Zhang and Sennrich, 2019), with a weight or without."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from ktcore.ops.base import Spec


@dataclass(frozen=True)
class RMSNormSpec(Spec):
    """Weight `weight` [dim]; call: float32 [..., dim] -> the same shape.

    Attributes:
        offset: added to the stored weight: 1.0 for checkpoints with zero-centred norms.
        scale: multiplies the result (the router's norm of Gemma-4).
    """

    op: ClassVar[str] = "rms_norm"
    dim: int
    eps: float
    weight_format: str = "F32"
    offset: float = 0.0
    scale: float = 1.0


def norm_factors(spec: RMSNormSpec, weight: torch.Tensor | None) -> torch.Tensor | None:
    """What a norm multiplies by: its weight [dim], offset and scale included; None where that is 1."""
    if weight is None:
        return None if spec.scale == 1.0 else torch.full((spec.dim,), spec.scale)
    return (weight + spec.offset) * spec.scale


def rms_norm(x: torch.Tensor, weight: torch.Tensor | None, eps: float) -> torch.Tensor:
    """x / sqrt(mean(x^2, -1) + eps) * weight, computed in float32; shape of x."""
    x = x.float()
    y = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)
    return y if weight is None else y * weight
