"""Token embedding: a row of the table per token id."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from ktcore.ops.base import Spec


@dataclass(frozen=True)
class EmbeddingSpec(Spec):
    """Weight `weight` [vocab, hidden]; call: ids int64 [T] -> float32 [T, hidden]."""

    op: ClassVar[str] = "embedding"
    vocab: int
    hidden: int
    weight_format: str


def embedding(ids: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Rows of `weight` [vocab, hidden] at `ids` [T] -> [T, hidden]."""
    return weight[ids]
