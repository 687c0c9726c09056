"""What the native experts take besides their matrices: biases and the limits of a clamped activation."""

from __future__ import annotations

import numpy as np

from ktcore.backend import LoadRequest, Unsupported
from ktcore.ops.mlp import ClampedGLU
from ktcore.ops.moe import ExpertsSpec
from ktcore_cpu import packing

CLAMPED = frozenset({"clamped", "clamped.plus", "clamped.after"})
"""Fields of a clamped activation that native blocks compute."""
Biases = tuple[np.ndarray | None, np.ndarray | None, np.ndarray | None]
"""float32 of gate and up [experts, intermediate] and down [experts, hidden]; None for none."""


def expert_biases(request: LoadRequest, spec: ExpertsSpec, prefix: str = "") -> Biases:
    """The biases of all experts."""
    if not spec.bias:
        return None, None, None
    gate, up, down = (packing.vector(request.weights, f"{prefix}{role}_bias") for role in ("gate", "up", "down"))
    return gate, up, down


def clamp_of(clamped: ClampedGLU | None) -> tuple[float, float, float, bool] | None:
    """A clamped activation as native blocks take it."""
    return None if clamped is None else (clamped.alpha, clamped.limit, clamped.plus, clamped.after)


def unsupported_clamp(clamped: ClampedGLU | None) -> Unsupported | None:
    """What native blocks do not know of a clamped activation; None when they know all."""
    if clamped is not None and clamped.after and clamped.alpha != 1.0:
        return Unsupported("a limit after the activation beside an alpha of its own")
    return None
