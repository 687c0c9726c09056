"""What the implementations share: on which chips they run."""

from __future__ import annotations

from typing import Any, cast

from ktcore.backend import Capabilities, Implementation, LoadRequest, Supported, Unsupported
from ktcore.weights.formats import known_formats
from ktcore_npu.runtime import NpuRuntime

FLOAT_BYTES = 4
HALF_BYTES = 2
ND, FRACTAL_NZ = 2, 29
ACTIVATIONS = ("silu", "relu", "gelu_tanh")


class NpuImplementation(Implementation):
    """Base of all: Atlas A2 (910B) and A3 (910C), which alone have every operator that is called here.

    Products run in bfloat16 where the device has it, else in float16. Option `compute` of those that multiply:
    "bfloat16" or "float16" instead.
    """

    capturable = True

    def __init__(self) -> None:
        self.id = f"npu.{self.spec_type.op}"

    def supports(self, spec: Any, device: Capabilities) -> Supported | Unsupported:
        """By chip, format and activation."""
        if "family" not in device.properties:
            return Unsupported(f"{device.name} is neither Atlas A2 (910B) nor A3 (910C): no fused operators")
        unknown = [name for name in spec.formats() if name not in known_formats()]
        if unknown:
            return Unsupported(f"weight format {unknown[0]} is unknown")
        if getattr(spec, "activation", "silu") not in ACTIVATIONS:
            return Unsupported(f"no operator for activation {spec.activation}")
        return Supported()


def npu(request: LoadRequest) -> NpuRuntime:
    """The device that a module is loaded on."""
    return cast(NpuRuntime, request.runtime)
