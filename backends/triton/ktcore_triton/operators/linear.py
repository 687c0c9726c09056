"""Linear projection: affine group weights through the kernel, all others held in the type that products run in."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import torch

from ktcore.backend import LoadRequest, Module
from ktcore.backend.loading import compute_dtype, on_device, optional
from ktcore.backend.mirror import upload
from ktcore.ops.linear import LinearSpec
from ktcore_triton.affine import AffineWeight, affine_bytes, affine_weight, supported
from ktcore_triton.operators.base import (
    FLOAT_BYTES,
    HALF_BYTES,
    TritonImplementation,
)

Product = Callable[[torch.Tensor, AffineWeight, torch.Tensor | None], torch.Tensor]


class TritonLinear(TritonImplementation):
    """Formats with scales in groups stay quantised, FP8 too; MXFP4, IQ and the like become bfloat16 or float16."""

    spec_type = LinearSpec
    handles = frozenset({"bias"})
    options = frozenset({"compute"})

    def load(self, request: LoadRequest) -> Module:
        """Repack into the affine group layout, or convert."""
        spec = cast(LinearSpec, request.spec)
        if not supported(spec.weight_format):
            return Plain(request)
        compute, tuning = compute_dtype(request), self.tuning(request.device)

        def product(x: torch.Tensor, weight: AffineWeight, bias: torch.Tensor | None) -> torch.Tensor:
            from ktcore_triton.linear import linear
            from ktcore_triton.tuning import Product

            tiles = tuning.linear(Product(x.shape[0], weight.rows, weight.cols, compute == torch.float32))
            return linear(x, weight, bias, tiles=tiles, compute=compute)

        return AffineLinear(request, product, dense=True)

    def packed_bytes(self, spec: LinearSpec, stored_bytes: int) -> int:
        """Of the layout, or two bytes a value."""
        values = spec.out_features * spec.in_features
        if supported(spec.weight_format):
            weight = affine_bytes(spec.weight_format, spec.out_features, spec.in_features, dense=True)
        else:
            weight = values * (FLOAT_BYTES if spec.weight_format == "F32" else HALF_BYTES)
        return weight + FLOAT_BYTES * spec.out_features * spec.bias


class AffineLinear:
    """float32 [T, in] -> float32 [T, out].

    Args:
        product: (x [T, in], columns in stored order, contiguous; weight; bias [out]) -> [T, out].
        dense: whether the weight is packed so (`affine_weight`).

    Attributes:
        layout: tag of the packed weight.
    """

    layout = "affine.groups"

    def __init__(self, request: LoadRequest, product: Product, dense: bool = False) -> None:
        spec = cast(LinearSpec, request.spec)
        stored = request.weights["weight"]
        device = request.runtime.device
        self._weight: AffineWeight = affine_weight(
            spec.weight_format, stored.raw(), spec.out_features, spec.in_features, device, dense=dense
        )
        order = stored.input_order
        self._order = None if order is None else upload(request.runtime, torch.from_numpy(order))
        self._bias = optional(request, "bias")
        self._product = product

    def unpack(self) -> torch.Tensor:
        """The weight [out, in] on the host, columns in stored order."""
        return self._weight.values().cpu()

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        x = x.contiguous() if self._order is None else x.index_select(1, self._order)
        return self._product(x, self._weight, self._bias)


class Plain:
    """float32 [T, in] -> float32 [T, out] with a weight in the type that products run in; F32 weights stay float32.

    Attributes:
        layout: tag of the packed weight.
    """

    layout = "rows"

    def __init__(self, request: LoadRequest) -> None:
        spec = cast(LinearSpec, request.spec)
        self._compute = torch.float32 if spec.weight_format == "F32" else compute_dtype(request)
        self._weight = on_device(request, "weight", self._compute)
        self._bias = optional(request, "bias")

    def unpack(self) -> torch.Tensor:
        """The weight [out, in] on the host."""
        return self._weight.float().cpu()

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.mm(x.to(self._compute), self._weight.t()).float()
        return y if self._bias is None else y + self._bias
