"""What the implementations share: when they can run, the type they compute in, how weights get to the device."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import torch

from ktcore.backend import Capabilities, Implementation, LoadRequest, Supported, Unsupported
from ktcore.weights.formats import known_formats
from ktcore_triton.tuning import Tuning

FLOAT_BYTES = 4
HALF_BYTES = 2
ACTIVATIONS = ("silu", "relu", "gelu_tanh")
COMPUTE = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}


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


def compute_dtype(request: LoadRequest) -> torch.dtype:
    """The type that products run in."""
    asked = request.options.get("compute")
    if asked is not None:
        return COMPUTE[asked]
    return torch.bfloat16 if request.device.has("bf16") else torch.float16


def on_device(request: LoadRequest, role: str, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """A weight, dequantised, on the device."""
    return request.weights[role].tensor().to(dtype).to(request.runtime.device)


def optional(request: LoadRequest, role: str) -> torch.Tensor | None:
    """The same in float32; None when the node has no such weight."""
    return on_device(request, role) if role in request.weights else None
