"""Token embedding: a row of the table per token id."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from ktcore.ops.base import Spec


@dataclass(frozen=True)
class EmbeddingSpec(Spec):
    """Weight `weight` [vocab, hidden]; call: ids int64 [T] -> float32 [T, hidden].

    Attributes:
        scale: multiplies the rows (Gemma).
    """

    op: ClassVar[str] = "embedding"
    vocab: int
    hidden: int
    weight_format: str
    scale: float = 1.0


def embedding(ids: torch.Tensor, weight: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
    """Rows of `weight` [vocab, hidden] at `ids` [T] -> [T, hidden], times `scale`."""
    return weight[ids] if scale == 1.0 else weight[ids] * scale
