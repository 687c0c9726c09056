"""The linear operator over the SYCL kernels, and what all operators over them share."""

from __future__ import annotations

from typing import Any

import torch
from ktcore_triton.affine import AffineWeight, affine_bytes, supported
from ktcore_triton.operators.linear import AffineLinear

from ktcore.backend import Capabilities, Implementation, LoadRequest, Module, Supported, Unsupported
from ktcore.backend.loading import compute_dtype
from ktcore.ops.linear import LinearSpec
from ktcore_xpu.sycl.build import why_unavailable
from ktcore_xpu.sycl.launcher import LANES, launcher_for

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


class SyclLinear(SyclImplementation):
    """Formats with scales in groups, kept quantised."""

    id = "xpu.sycl_linear"
    spec_type = LinearSpec
    handles = frozenset({"bias"})

    def supports(self, spec: LinearSpec, device: Capabilities) -> Supported | Unsupported:
        """Formats of the affine group layout."""
        if not supported(spec.weight_format):
            return Unsupported(f"weight format {spec.weight_format}: the kernels take formats with scales in groups")
        return super().supports(spec, device)

    def load(self, request: LoadRequest) -> Module:
        """Repack into the affine group layout."""
        launcher, compute = launcher_for(request.runtime), compute_dtype(request)

        def product(x: torch.Tensor, weight: AffineWeight, bias: torch.Tensor | None) -> torch.Tensor:
            from ktcore_xpu.sycl.linear import linear

            return linear(launcher, x, weight, bias, compute)

        return AffineLinear(request, product)

    def packed_bytes(self, spec: LinearSpec, stored_bytes: int) -> int:
        """Of the layout."""
        if not supported(spec.weight_format):
            return stored_bytes
        weight = affine_bytes(spec.weight_format, spec.out_features, spec.in_features)
        return weight + FLOAT_BYTES * spec.out_features * spec.bias
