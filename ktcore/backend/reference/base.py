"""What reference implementations share: they hold float32, run everywhere, and refuse only what nothing can read."""

from __future__ import annotations

from typing import Any

import torch

from ktcore.backend.capabilities import Capabilities
from ktcore.backend.implementation import Implementation, LoadRequest, Support, Supported, Unsupported
from ktcore.ops.mlp import ACTIVATIONS
from ktcore.weights.formats import known_formats

FLOAT_BYTES = 4


class ReferenceImplementation(Implementation):
    """Base of all: any device, any format that can be dequantised, any activation that `ktcore.ops` defines."""

    def supports(self, spec: Any, device: Capabilities) -> Support:
        unknown = [name for name in spec.formats() if name not in known_formats()]
        if unknown:
            return Unsupported(f"weight format {unknown[0]} is unknown")
        if getattr(spec, "activation", "silu") not in ACTIVATIONS:
            return Unsupported(f"activation {spec.activation} is not one of {', '.join(ACTIVATIONS)}")
        return Supported()


def loaded(request: LoadRequest, role: str) -> torch.Tensor:
    """A weight as float32 on the runtime's device."""
    return request.weights[role].tensor().to(request.runtime.device)
