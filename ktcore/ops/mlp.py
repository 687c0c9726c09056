"""Gated MLP down(act(gate x) * up x), optionally as a residual branch with its own pre-norm."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch

from ktcore.ops.base import Spec
from ktcore.ops.linear import LinearSpec
from ktcore.ops.norm import RMSNormSpec

ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "silu": torch.nn.functional.silu,
    "relu": torch.nn.functional.relu,
    "gelu_tanh": lambda x: torch.nn.functional.gelu(x, approximate="tanh"),
}


@dataclass(frozen=True)
class MLPSpec(Spec):
    """Call: x float32 [T, hidden] -> [T, hidden].

    Attributes:
        norm: applied to x first; None inside a MoE branch, which norms once for all of its parts.
        residual: add x to the result.
        post_norm: applied to the branch's result before x is added (dense GLM-4).
    """

    op: ClassVar[str] = "mlp"
    hidden: int
    intermediate: int
    activation: str
    gate: LinearSpec
    up: LinearSpec
    down: LinearSpec
    norm: RMSNormSpec | None = None
    residual: bool = False
    post_norm: RMSNormSpec | None = None


def gated(gate: torch.Tensor, up: torch.Tensor, activation: str) -> torch.Tensor:
    """act(gate) * up, elementwise."""
    return ACTIVATIONS[activation](gate) * up
