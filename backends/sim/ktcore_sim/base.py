"""What the implementations share: what they support."""

from __future__ import annotations

from typing import Any

import torch

from ktcore.backend import Capabilities, Implementation, Supported, Unsupported
from ktcore.weights.formats import known_formats

FLOAT_BYTES = 4
ACTIVATIONS = ("silu", "relu", "gelu_tanh")


class SimImplementation(Implementation):
    """Every weight format that can be dequantised, held in float32."""

    capturable = True

    def supports(self, spec: Any, device: Capabilities) -> Supported | Unsupported:
        """Formats and activations that the kernels know."""
        unknown = [name for name in spec.formats() if name not in known_formats()]
        if unknown:
            return Unsupported(f"weight format {unknown[0]} is unknown")
        if getattr(spec, "activation", "silu") not in ACTIVATIONS:
            return Unsupported(f"no kernel for activation {spec.activation}")
        return Supported()


def kernels() -> Any:
    """The package's own operators; there once a runtime is open."""
    return torch.ops.ktcore_sim
