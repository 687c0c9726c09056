"""Products with weights in the affine group layout, by SYCL kernels."""

from __future__ import annotations

import torch
from ktcore_triton.affine import AffineWeight

from ktcore.errors import BackendError
from ktcore_xpu.sycl.launcher import LANES, TYPES, Argument, Define, Launcher

ROWS = 8
"""Sub-groups, of a row each, in a work-group of `gemv`."""
FEW = 8
"""Up to so many tokens weights are read once by `gemv`, or twice; more go through tiles."""
TILE = (32, 64)
"""Tokens and output rows of a tile of `gemm`."""
ITEMS = 256
DPAS_TYPES = {
    torch.float16: {"ELEMENT": "sycl::half", "CAST": "sycl::half"},
    torch.bfloat16: {"ELEMENT": "sycl::ext::oneapi::bfloat16", "CAST": "brain"},
}


def linear(
    launcher: Launcher,
    x: torch.Tensor,
    weight: AffineWeight,
    bias: torch.Tensor | None = None,
    compute: torch.dtype = torch.float32,
) -> torch.Tensor:
    """x W^T + b, summed in float32.

    Args:
        x: [tokens, cols] float16, bfloat16 or float32, contiguous.
        bias: float32 [rows].
        compute: type of the products of many tokens where the device has matrix instructions for it; elsewhere, and
            for few tokens, they are in float32.

    Returns:
        float32 [tokens, rows].

    Raises:
        BackendError: shapes or types that do not fit.
    """
    check(x, weight)
    tokens = x.shape[0]
    y = torch.empty((tokens, weight.rows), dtype=torch.float32, device=x.device)
    if tokens <= FEW:
        block = max(1, min(4, tokens))
        kernel = launcher.kernel("gemv.cpp", "gemv", X=TYPES[x.dtype], TOKENS=block, ROWS=ROWS, **macros(weight))
        groups, width = (1, -(-tokens // block), -(-weight.rows // ROWS)), ROWS * LANES
    else:
        kernel = launcher.kernel("gemm.cpp", "gemm", **gemm_macros(launcher.facts["dpas"] == "1", x, weight, compute))
        groups, width = (1, -(-tokens // TILE[0]), -(-weight.rows // TILE[1])), ITEMS
    launcher.launch(kernel, groups, width, x, *parts(weight), bias, y, tokens, weight.rows, weight.cols)
    return y


def check(x: torch.Tensor, weight: AffineWeight) -> None:
    """That x fits the weight and the kernels."""
    if x.dim() != 2 or x.shape[1] != weight.cols or not x.is_contiguous():
        raise BackendError(f"x {list(x.shape)} for a weight [{weight.rows}, {weight.cols}]: contiguous rows are needed")
    if x.dtype not in TYPES:
        raise BackendError(f"kernels take float16, bfloat16 or float32, not {x.dtype}")
    if weight.group % 16 or weight.cols % 32:
        raise BackendError(f"groups of {weight.group} in {weight.cols} columns: multiples of 16 and 32 are needed")


def parts(weight: AffineWeight) -> tuple[Argument, ...]:
    """A weight as kernels take it: codes, scale, offset (which they leave alone where the layout has none)."""
    return weight.codes, weight.scale, weight.scale if weight.offset is None else weight.offset


def macros(weight: AffineWeight) -> dict[str, Define]:
    """How the kernels are told of a weight's layout."""
    if weight.offset is not None and weight.offset.dtype != weight.scale.dtype:
        raise BackendError(f"scales in {weight.scale.dtype} and offsets in {weight.offset.dtype}")
    return {
        "BITS": weight.bits,
        "ZERO": weight.zero,
        "GROUP": weight.group,
        "SPAN": weight.span,
        "OFFSET": weight.offset is not None,
        "SCALE": TYPES[weight.scale.dtype],
    }


def gemm_macros(dpas: bool, x: torch.Tensor, weight: AffineWeight, compute: torch.dtype) -> dict[str, Define]:
    """Of the tiled product; matrix instructions take no float32."""
    use = dpas and compute in DPAS_TYPES
    return {"X": TYPES[x.dtype], "DPAS": use, **(DPAS_TYPES[compute] if use else {}), **macros(weight)}
