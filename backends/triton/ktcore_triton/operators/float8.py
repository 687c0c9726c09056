"""Linear projection with weights and activations both as 8-bit floats, for rules that ask for it."""

from __future__ import annotations

from typing import cast

import torch

from ktcore.backend import Capabilities, LoadRequest, Module, Supported, Unsupported
from ktcore.backend.loading import optional
from ktcore.backend.mirror import upload
from ktcore.errors import BackendError
from ktcore.ops.linear import LinearSpec
from ktcore.weights import get_format
from ktcore_triton.affine import affine_bytes, affine_weight
from ktcore_triton.codes import FLOAT8
from ktcore_triton.operators.base import FLOAT_BYTES, TritonImplementation
from ktcore_triton.tuning import Product, Tuned, Tuning

NAMES = ("e4m3fn", "e4m3fnuz")
PRODUCTS = ("triton", "torch")


class TritonFloat8Linear(TritonImplementation):
    """Weights with a scale for 128 columns, activations quantised alike, in the flavour that the device multiplies.

    Twice the products of 16 bits a second, and an error of about 3% of a result's size, ten times that of 16 bits: no
    shipped rule asks for it. Option `product`: "triton" (default), or "torch", which is `torch._scaled_mm` with blocks
    of 1 x 128, where that takes them.
    """

    spec_type = LinearSpec
    handles = frozenset({"bias"})
    options = frozenset({"product"})

    def __init__(self, backend: str, tuning: Tuned) -> None:
        super().__init__(backend, tuning)
        self.id = f"{backend}.fp8_linear"

    def supports(self, spec: LinearSpec, device: Capabilities) -> Supported | Unsupported:
        """For FP8 weights on devices with FP8 products."""
        if spec.weight_format not in (FLOAT8, f"{FLOAT8}_ORDERED"):
            return Unsupported(f"weights of {spec.weight_format}: only {FLOAT8} are 8-bit floats with scales in groups")
        if _flavour(device) is None:
            return Unsupported(f"{device.name} has no FP8 products")
        return super().supports(spec, device)

    def load(self, request: LoadRequest) -> Module:
        """Repack into the device's flavour."""
        product = request.options.get("product", PRODUCTS[0])
        if product not in PRODUCTS:
            raise BackendError(f"{request.name}: product is {product!r}", f"one of {', '.join(PRODUCTS)}")
        return Float8Linear(request, self.tuning(request.device), product == "torch")

    def packed_bytes(self, spec: LinearSpec, stored_bytes: int) -> int:
        """A byte a value and its scales."""
        if get_format(spec.weight_format).name != FLOAT8:
            return stored_bytes
        return affine_bytes(FLOAT8, spec.out_features, spec.in_features) + FLOAT_BYTES * spec.out_features * spec.bias


class Float8Linear:
    """float32 [T, in] -> float32 [T, out].

    Attributes:
        layout: tag of the packed weight.
    """

    layout = "float8.groups"

    def __init__(self, request: LoadRequest, tuning: Tuning, by_torch: bool) -> None:
        from ktcore_triton.float8 import FLAVOURS, float8_weight

        spec = cast(LinearSpec, request.spec)
        stored = request.weights["weight"]
        flavour = _flavour(request.device)
        assert flavour is not None, "such devices are not supported"
        packed = affine_weight(FLOAT8, stored.raw(), spec.out_features, spec.in_features, request.runtime.device)
        self._weight = float8_weight(packed, FLAVOURS[flavour])
        order = stored.input_order
        self._order = None if order is None else upload(request.runtime, torch.from_numpy(order))
        self._bias = optional(request, "bias")
        self._tuning = tuning
        self._by_torch = by_torch

    def unpack(self) -> torch.Tensor:
        """The weight [out, in] on the host, columns in stored order."""
        return self._weight.values().cpu()

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        from ktcore_triton.float8 import float8_linear, scaled_mm_linear

        x = x.contiguous() if self._order is None else x.index_select(1, self._order)
        if self._by_torch:
            return scaled_mm_linear(x, self._weight, self._bias)
        rows, cols = self._weight.codes.shape
        tiles = self._tuning.linear(Product(x.shape[0], rows, cols))
        return float8_linear(x, self._weight, self._bias, tiles=tiles)


def _flavour(device: Capabilities) -> str | None:
    return next((name for name in NAMES if device.has(f"fp8:{name}")), None)
