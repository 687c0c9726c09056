"""The linear operator over the SYCL kernels, and what all operators over them share."""

from __future__ import annotations

from typing import Any, cast

import torch
from ktcore_triton.affine import affine_bytes, affine_weight, supported

from ktcore.backend import Capabilities, Implementation, LoadRequest, Module, Supported, Unsupported
from ktcore.backend.mirror import upload
from ktcore.ops.linear import LinearSpec
from ktcore_xpu.sycl.build import why_unavailable
from ktcore_xpu.sycl.launcher import LANES, Launcher, launcher_for

FLOAT_BYTES = 4


class SyclImplementation(Implementation):
    """Base of all: what a device must have for the kernels."""

    def supports(self, spec: Any, device: Capabilities) -> Supported | Unsupported:
        """Devices with sub-groups of 16; a live one also needs the SYCL runtime's compiler."""
        widths = str(device.properties.get("subgroups", LANES)).split(",")
        if str(LANES) not in widths:
            return Unsupported(f"the kernels need sub-groups of {LANES}, the device has {', '.join(widths)}")
        missing = why_unavailable() if device.live else None
        return Supported() if missing is None else Unsupported(missing)


def compute_dtype(request: LoadRequest) -> torch.dtype:
    """The type that caches are held and matrix products run in."""
    return torch.bfloat16 if request.device.has("bf16") else torch.float16


class SyclLinear(SyclImplementation):
    """Formats with scales in groups, kept quantised."""

    id = "xpu.sycl_linear"
    spec_type = LinearSpec

    def supports(self, spec: LinearSpec, device: Capabilities) -> Supported | Unsupported:
        """Formats of the affine group layout."""
        if not supported(spec.weight_format):
            return Unsupported(f"weight format {spec.weight_format}: the kernels take formats with scales in groups")
        return super().supports(spec, device)

    def load(self, request: LoadRequest) -> Module:
        """Repack into the affine group layout."""
        return SyclLinearModule(request)

    def packed_bytes(self, spec: LinearSpec, stored_bytes: int) -> int:
        """Of the layout."""
        if not supported(spec.weight_format):
            return stored_bytes
        weight = affine_bytes(spec.weight_format, spec.out_features, spec.in_features)
        return weight + FLOAT_BYTES * spec.out_features * spec.bias


class SyclLinearModule:
    """float32 [T, in] -> float32 [T, out].

    Attributes:
        layout: tag of the packed weight.
    """

    layout = "affine.groups"

    def __init__(self, request: LoadRequest) -> None:
        spec = cast(LinearSpec, request.spec)
        stored = request.weights["weight"]
        device = request.runtime.device
        self._launcher: Launcher = launcher_for(request.runtime)
        self._weight = affine_weight(spec.weight_format, stored.raw(), spec.out_features, spec.in_features, device)
        self._compute = compute_dtype(request)
        order = stored.input_order
        self._order = None if order is None else upload(request.runtime, torch.from_numpy(order))
        self._bias = request.weights["bias"].tensor().float().to(device) if "bias" in request.weights else None

    def unpack(self) -> torch.Tensor:
        """The weight [out, in] on the host, columns in stored order."""
        return self._weight.values().cpu()

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        from ktcore_xpu.sycl.linear import linear

        x = x.contiguous() if self._order is None else x.index_select(1, self._order)
        return linear(self._launcher, x, self._weight, self._bias, self._compute)
