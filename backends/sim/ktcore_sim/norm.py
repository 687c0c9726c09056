"""RMSNorm as one launch."""

from __future__ import annotations

from typing import cast

import torch

from ktcore.backend import LoadRequest
from ktcore.backend.loading import optional
from ktcore.ops.norm import RMSNormSpec
from ktcore_sim.base import FLOAT_BYTES, SimImplementation, kernels


class SimRMSNorm(SimImplementation):
    """Over the last axis, with a weight or without, zero-centred or not."""

    id = "sim.rms_norm"
    spec_type = RMSNormSpec
    handles = frozenset({"offset"})

    def load(self, request: LoadRequest) -> SimRMSNormModule:
        """Add the offset once."""
        return SimRMSNormModule(request)

    def packed_bytes(self, spec: RMSNormSpec, stored_bytes: int) -> int:
        """Float32."""
        return FLOAT_BYTES * spec.dim if stored_bytes else 0


class SimRMSNormModule:
    """float32 [..., dim] -> the same shape."""

    def __init__(self, request: LoadRequest) -> None:
        spec = cast(RMSNormSpec, request.spec)
        found = optional(request, "weight")
        self._weight = found + spec.offset if found is not None and spec.offset else found
        self._eps = spec.eps

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return cast(torch.Tensor, kernels().rms_norm(x, self._weight, self._eps))
