"""What the implementations share: when they can run."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

from ktcore.backend import Capabilities, Implementation, Supported, Unsupported
from ktcore.weights.formats import known_formats
from ktcore_triton.tuning import Tuned, Tuning

FLOAT_BYTES = 4
HALF_BYTES = 2
ACTIVATIONS = ("silu", "relu", "gelu_tanh")


class TritonImplementation(Implementation):
    """Base of all. Products run in bfloat16 where the device has it, else in float16, and are summed in float32.

    Option `compute` of those that multiply: "bfloat16", "float16" or "float32" instead.

    Args:
        backend: the name that comes before the dot of the id.
        tuning: launch shapes, or what gives them for a device.
    """

    capturable = True

    def __init__(self, backend: str, tuning: Tuned) -> None:
        self.id = f"{backend}.{self.spec_type.op}"
        self._tuning = tuning

    def tuning(self, device: Capabilities) -> Tuning:
        """The launch shapes for a device."""
        return self._tuning if isinstance(self._tuning, Tuning) else self._tuning(device)

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
