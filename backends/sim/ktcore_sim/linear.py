"""Linear projection on the device."""

from __future__ import annotations

import torch

from ktcore.backend import LoadRequest
from ktcore.backend.loading import on_device, optional
from ktcore.ops.linear import LinearSpec
from ktcore_sim.base import FLOAT_BYTES, SimImplementation


class SimLinear(SimImplementation):
    """Holds the weight as [in, out], so that a product reads it in order."""

    id = "sim.linear"
    spec_type = LinearSpec
    handles = frozenset({"bias"})

    def load(self, request: LoadRequest) -> SimLinearModule:
        """Dequantise and transpose."""
        return SimLinearModule(request)

    def packed_bytes(self, spec: LinearSpec, stored_bytes: int) -> int:
        """Float32."""
        return FLOAT_BYTES * spec.out_features * (spec.in_features + spec.bias)


class SimLinearModule:
    """float32 [T, in] -> float32 [T, out].

    Attributes:
        layout: tag of the packed weight.
    """

    layout = "sim.in_out.f32"

    def __init__(self, request: LoadRequest) -> None:
        self._packed = on_device(request, "weight").t().contiguous()
        self._bias = optional(request, "bias")

    def unpack(self) -> torch.Tensor:
        """The weight [out, in] on the host."""
        return self._packed.t().cpu()

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return torch.mm(x, self._packed) if self._bias is None else torch.addmm(self._bias, x, self._packed)
