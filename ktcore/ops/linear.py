"""Linear projection y = x W^T + b."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from ktcore.ops.base import Spec


@dataclass(frozen=True)
class LinearSpec(Spec):
    """Weights `weight` [out, in] and, with `bias`, `bias` [out]; call: float32 [T, in] -> float32 [T, out].

    Attributes:
        softcap: the result is softcap * tanh(result / softcap) (Gemma's head); 0 for none.
    """

    op: ClassVar[str] = "linear"
    in_features: int
    out_features: int
    weight_format: str
    bias: bool = False
    softcap: float = 0.0


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x [..., in] times weight [out, in] transposed, plus bias [out] -> [..., out]."""
    return torch.nn.functional.linear(x, weight, bias)


def capped(y: torch.Tensor, softcap: float) -> torch.Tensor:
    """softcap * tanh(y / softcap); y where softcap is 0."""
    return torch.tanh(y / softcap) * softcap if softcap else y
