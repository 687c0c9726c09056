"""What the implementations share: when they can run."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

from ktcore.backend import Capabilities, Implementation, Supported, Unsupported
from ktcore.weights.formats import known_formats
from ktcore_triton.tuning import Tuning

FLOAT_BYTES = 4
HALF_BYTES = 2
ACTIVATIONS = ("silu", "relu", "gelu_tanh")


class TritonImplementation(Implementation):
    """Base of all. Products run in bfloat16 where the device has it, else in float16, and are summed in float32.

    Option `compute` of those that multiply: "bfloat16", "float16" or "float32" instead.

    Args:
        backend: the name that comes before the dot of the id.
    """

    capturable = True

    def __init__(self, backend: str, tuning: Tuning) -> None:
        self.id = f"{backend}.{self.spec_type.op}"
        self.tuning = tuning

    def supports(self, spec: Any, device: Capabilities) -> Supported | Unsupported:
        """Where Triton is installed, for formats that can be read; without a live device, that it will be."""
        if device.live and find_spec("triton") is None:
            return Unsupported("Triton is not installed: install the build of triton that matches torch")
        unknown = [name for name in spec.formats() if name not in known_formats()]
        if unknown:
            return Unsupported(f"weight format {unknown[0]} is unknown")
        if getattr(spec, "activation", "silu") not in ACTIVATIONS:
            return Unsupported(f"no kernel for activation {spec.activation}")
        return Supported()
