"""What the native experts take besides their matrices: biases and the limits of a clamped activation."""

from __future__ import annotations

import numpy as np

from ktcore.backend import LoadRequest
from ktcore.ops.moe import ExpertsSpec
from ktcore_cpu import packing

Biases = tuple[np.ndarray | None, np.ndarray | None, np.ndarray | None]
"""float32 of gate and up [experts, intermediate] and down [experts, hidden]; None for none."""


def expert_biases(request: LoadRequest, spec: ExpertsSpec, prefix: str = "") -> Biases:
    """The biases of all experts."""
    if not spec.bias:
        return None, None, None
    gate, up, down = (packing.vector(request.weights, f"{prefix}{role}_bias") for role in ("gate", "up", "down"))
    return gate, up, down


def clamp_of(spec: ExpertsSpec) -> tuple[float, float, float] | None:
    """Alpha, limit and what is added to up, of a clamped activation."""
    return None if spec.clamped is None else (spec.clamped.alpha, spec.clamped.limit, spec.clamped.plus)
