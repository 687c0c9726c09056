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
class ClampedGLU:
    """A gated product that holds its factors within a limit: min(gate, limit) * sigmoid(alpha * min(gate, limit)) *
    (clamp(up, +-limit) + plus).

    gpt-oss's and MiniMax-M3's have an alpha of their own and 1 added; DeepSeek-V4's and GLM-5.3's are alpha 1 and
    plus 0, SwiGLU of both within the limit.

    Attributes:
        alpha: of the sigmoid; limit: above 0.
        plus: added to up.
        after: the limit is for the activation instead of its input: min(gate * sigmoid(alpha * gate), limit)
            (Step-3.5).
    """

    alpha: float
    limit: float
    plus: float = 1.0
    after: bool = False


@dataclass(frozen=True)
class MLPSpec(Spec):
    """Call: x float32 [T, hidden] -> [T, hidden]. With `out_scale` a weight `out_scale` [1] of its own.

    Attributes:
        norm: applied to x first; None inside a MoE branch, which norms once for all of its parts.
        residual: add x to the result.
        post_norm: applied to the branch's result before x is added (dense GLM-4).
        clamped: replaces act(gate) * up; `activation` has no meaning then.
        out_scale: a stored factor multiplies the end result, x included (Gemma-4).
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
    clamped: ClampedGLU | None = None
    out_scale: bool = False


def gated(gate: torch.Tensor, up: torch.Tensor, activation: str) -> torch.Tensor:
    """act(gate) * up, elementwise."""
    return ACTIVATIONS[activation](gate) * up


def clamped_glu(gate: torch.Tensor, up: torch.Tensor, c: ClampedGLU) -> torch.Tensor:
    """`ClampedGLU` of gate and up, elementwise."""
    g = gate if c.after else gate.clamp(max=c.limit)
    g = g * torch.sigmoid(c.alpha * g)
    return (g.clamp(max=c.limit) if c.after else g) * (up.clamp(-c.limit, c.limit) + c.plus)


def within(gate: torch.Tensor, up: torch.Tensor, activation: str, clamped: ClampedGLU | None) -> torch.Tensor:
    """What an MLP or an expert hands to its down projection."""
    return gated(gate, up, activation) if clamped is None else clamped_glu(gate, up, clamped)
