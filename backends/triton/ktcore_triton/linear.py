"""Linear projection with a weight in the affine group layout."""

from __future__ import annotations

import torch
import triton

from ktcore.errors import BackendError
from ktcore_triton.affine import AffineWeight
from ktcore_triton.dtypes import compute_type
from ktcore_triton.kernels.linear import linear_kernel
from ktcore_triton.tuning import LinearTiles, linear_tiles


def linear(
    x: torch.Tensor,
    weight: AffineWeight,
    bias: torch.Tensor | None = None,
    *,
    tiles: LinearTiles | None = None,
    compute: torch.dtype | None = None,
) -> torch.Tensor:
    """x W^T + b, summed in float32.

    Args:
        x: [tokens, cols] float16, bfloat16 or float32, contiguous.
        bias: [rows].
        tiles: launch shape; by default `linear_tiles`.
        compute: type that weights and x are multiplied in, by default x's.

    Returns:
        [tokens, rows] of x's type.

    Raises:
        BackendError: shapes that do not fit, or x is not contiguous.
    """
    if x.dim() != 2 or x.shape[1] != weight.cols or not x.is_contiguous():
        raise BackendError(f"x {list(x.shape)} for a weight [{weight.rows}, {weight.cols}]: contiguous rows are needed")
    tokens, rows = x.shape[0], weight.rows
    compute = compute or x.dtype
    tiles = tiles or linear_tiles(tokens, wide=compute == torch.float32)
    spans = triton.cdiv(weight.cols // weight.span, tiles.splits)
    splits = triton.cdiv(weight.cols // weight.span, spans)
    out = torch.empty((splits, tokens, rows), dtype=x.dtype if splits == 1 else torch.float32, device=x.device)
    if not tokens:
        return out[0].to(x.dtype)
    fused = bias is not None and splits == 1
    grid = (triton.cdiv(rows, tiles.block_n), triton.cdiv(tokens, tiles.block_m), splits)
    linear_kernel[grid](
        x, weight.codes, weight.scale, weight.scale if weight.offset is None else weight.offset,
        weight.scale if weight.over is None else weight.over, bias if fused else x, out,
        tokens, rows, weight.cols, spans * weight.span,
        BITS=weight.bits, ZERO=weight.zero, GROUP=weight.group, SPAN=weight.span,
        BLOCK_M=tiles.block_m, BLOCK_N=tiles.block_n,
        HAS_OFFSET=weight.offset is not None, SCALES=weight.scales, HAS_BIAS=fused, COMPUTE=compute_type(compute),
        FLOAT8=weight.float8,
        **tiles.launch.options(),
    )  # fmt: skip
    if splits == 1:
        return out[0]
    total = out.sum(0)
    return (total if bias is None else total + bias.float()).to(x.dtype)
