"""Products of 8-bit floats: weights with a scale for 128 columns of a row, activations quantised alike."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ktcore.errors import BackendError
from ktcore.weights.groups import FP8_GROUP
from ktcore_triton.affine import AffineWeight
from ktcore_triton.tuning import LinearTiles, linear_tiles


@dataclass(frozen=True)
class Flavour:
    """Kinds of numbers with 4 bits of exponent and 3 of mantissa.

    Attributes:
        top: the largest; bias: of the exponent.
    """

    name: str
    dtype: torch.dtype
    top: float
    bias: int


FLAVOURS = {
    "e4m3fn": Flavour("e4m3fn", torch.float8_e4m3fn, 448.0, 7),
    "e4m3fnuz": Flavour("e4m3fnuz", torch.float8_e4m3fnuz, 240.0, 8),
}
"""By what a device's feature "fp8:…" calls them."""


@dataclass(frozen=True)
class Float8Weight:
    """codes uint8 [rows, cols] of a flavour, scale float32 [rows, cols / 128], on a device."""

    codes: torch.Tensor
    scale: torch.Tensor
    flavour: Flavour

    def values(self) -> torch.Tensor:
        """float32 [rows, cols]."""
        numbers = self.codes.view(self.flavour.dtype).float()
        return numbers * self.scale.repeat_interleave(FP8_GROUP, 1)


def float8_weight(weight: AffineWeight, flavour: Flavour) -> Float8Weight:
    """The e4m3fn numbers of a weight in another flavour; values stay.

    The same code means half as much in e4m3fnuz, whose exponent is biased by one more: scales double. Its only code
    that is no number is e4m3fn's negative zero.

    Raises:
        BackendError: the weight holds no such numbers.
    """
    if not weight.float8 or weight.group != FP8_GROUP:
        raise BackendError(
            f"codes of {weight.bits} bits in groups of {weight.group} are no 8-bit floats in groups of 128"
        )
    codes, scale = weight.codes, weight.scale.float()
    if flavour.bias == FLAVOURS["e4m3fn"].bias:
        return Float8Weight(codes, scale.contiguous(), flavour)
    none = (codes & 127) == 127
    codes = torch.where(codes == 128, 0, codes)
    return Float8Weight(torch.where(none, 128, codes).to(torch.uint8), (2 * scale).contiguous(), flavour)


def quantised(x: torch.Tensor, flavour: Flavour) -> tuple[torch.Tensor, torch.Tensor]:
    """x [T, cols] as codes uint8 [T, cols], the largest of each 128 `top`, and scales float32 [cols / 128, T]."""
    from ktcore_triton.kernels.fp8 import quantise_kernel

    tokens, cols = x.shape
    if cols % FP8_GROUP or not x.is_contiguous():
        raise BackendError(f"x {list(x.shape)}: contiguous rows of whole groups of {FP8_GROUP} are needed")
    codes = torch.empty((tokens, cols), dtype=torch.uint8, device=x.device)
    scales = torch.empty((cols // FP8_GROUP, tokens), dtype=torch.float32, device=x.device)
    if tokens:
        quantise_kernel[(tokens, cols // FP8_GROUP)](
            x, codes, scales, tokens, cols, flavour.top, BIAS=flavour.bias, GROUP=FP8_GROUP, num_warps=1
        )
    return codes, scales


def float8_linear(
    x: torch.Tensor, weight: Float8Weight, bias: torch.Tensor | None = None, *, tiles: LinearTiles | None = None
) -> torch.Tensor:
    """x W^T + b with x quantised; groups' sums are scaled and added in float32.

    Args:
        x: [tokens, cols], contiguous; bias: [rows].

    Returns:
        float32 [tokens, rows].
    """
    import triton

    from ktcore_triton.dtypes import float8_type
    from ktcore_triton.kernels.fp8 import product_kernel

    rows, cols = weight.codes.shape
    if x.dim() != 2 or x.shape[1] != cols:
        raise BackendError(f"x {list(x.shape)} for a weight [{rows}, {cols}]")
    codes, scales = quantised(x, weight.flavour)
    tokens = x.shape[0]
    out = torch.empty((tokens, rows), dtype=torch.float32, device=x.device)
    if tokens:
        tiles = tiles or linear_tiles(tokens)
        product_kernel[(triton.cdiv(rows, tiles.block_n), triton.cdiv(tokens, tiles.block_m))](
            codes, scales, weight.codes, weight.scale, scales if bias is None else bias, out, tokens, rows, cols,
            GROUP=FP8_GROUP, BLOCK_M=tiles.block_m, BLOCK_N=tiles.block_n, HAS_BIAS=bias is not None,
            KIND=float8_type(weight.flavour.dtype), **tiles.launch.options(),
        )  # fmt: skip
    return out


def scaled_mm_linear(x: torch.Tensor, weight: Float8Weight, bias: torch.Tensor | None = None) -> torch.Tensor:
    """The same product by torch's `_scaled_mm`, both operands scaled by 1 x 128 blocks.

    torch takes them so on chips of compute capability 9.0 with CUDA 12.9 or newer (`ATen/native/cuda/ScaledBlas.cpp`,
    is_blockwise_1x128_scaling): scale_a [T, cols / 128] and scale_b transposed [rows, cols / 128], both with their
    outer dimension contiguous; rows and cols are multiples of 16.
    """
    codes, scales = quantised(x, weight.flavour)
    kind = weight.flavour.dtype
    # [cols / 128, rows] contiguous: transposed, its rows are contiguous
    y: torch.Tensor = torch._scaled_mm(
        codes.view(kind),
        weight.codes.view(kind).t(),
        scales.t(),
        weight.scale.t().contiguous(),
        out_dtype=torch.float32,
    )
    return y if bias is None else y + bias
