"""Rotary position embedding as one launch."""

from __future__ import annotations

from typing import cast

import torch

from ktcore.backend import LoadRequest
from ktcore.backend.handles import FREQUENCIES
from ktcore.backend.mirror import upload
from ktcore.ops.rope import RopeSpec, inverse_frequencies
from ktcore_sim.base import FLOAT_BYTES, SimImplementation, kernels


class SimRope(SimImplementation):
    """Both pairings, partial width, every scaling; frequencies are worked out once, on the host."""

    id = "sim.rope"
    spec_type = RopeSpec
    handles = FREQUENCIES

    def load(self, request: LoadRequest) -> SimRopeModule:
        """Bring the frequencies to the device."""
        return SimRopeModule(request)

    def packed_bytes(self, spec: RopeSpec, stored_bytes: int) -> int:
        """Float32."""
        return FLOAT_BYTES * spec.dim // 2


class SimRopeModule:
    """x float32 [T, heads, d], positions int64 [T] -> the shape of x."""

    def __init__(self, request: LoadRequest) -> None:
        spec = cast(RopeSpec, request.spec)
        divisors = request.weights["freq_factors"].tensor() if spec.freq_factors else None
        freq, self._factor = inverse_frequencies(spec, divisors)
        self._runtime = request.runtime
        self._freq = freq.to(request.runtime.device)
        self._interleaved = spec.pairing == "interleaved"

    def __call__(self, x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        if positions.device != x.device:
            positions = upload(self._runtime, positions)
        return cast(torch.Tensor, kernels().rope(x, positions, self._freq, self._factor, self._interleaved))
