"""Launches of the row kernels: RMSNorm with a residual, RoPE, SwiGLU, writes into a paged cache."""

from __future__ import annotations

import torch
import triton

from ktcore.errors import BackendError
from ktcore.ops.rope import Pairing
from ktcore_triton.kernels.rows import cache_write_kernel, rms_norm_kernel, rope_kernel, swiglu_kernel

ELEMENTS = 1024


def rms_norm(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    eps: float,
    *,
    residual: torch.Tensor | None = None,
    offset: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """RMSNorm of s = x + residual, computed in float32.

    Args:
        x, residual: [..., dim], contiguous; weight: [dim], `offset` is added to it.

    Returns:
        The norm and s, both of x's type and shape; without a residual s is x itself.
    """
    _contiguous(x, *(() if residual is None else (residual,)))
    dim = x.shape[-1]
    if residual is not None and residual.shape != x.shape:
        raise BackendError(f"a residual {list(residual.shape)} for x {list(x.shape)}")
    if weight is not None and weight.shape != (dim,):
        raise BackendError(f"a norm weight {list(weight.shape)} for rows of {dim}")
    out = torch.empty_like(x)
    total = x if residual is None else torch.empty_like(x)
    if x.numel():
        rms_norm_kernel[(x.numel() // dim,)](
            x, x if residual is None else residual, x if weight is None else weight, out, total, dim, eps, offset,
            BLOCK=triton.next_power_of_2(dim), HAS_RESIDUAL=residual is not None, HAS_WEIGHT=weight is not None,
            num_warps=8 if dim > 2 * ELEMENTS else 4,
        )  # fmt: skip
    return out, total


def rope(
    x: torch.Tensor, positions: torch.Tensor, frequencies: torch.Tensor, factor: float, pairing: Pairing
) -> torch.Tensor:
    """Rotate the first 2 * len(frequencies) values of x [T, heads, width]; as `ktcore.ops.rope.rope`.

    Args:
        positions: int64 or int32 [T]; frequencies: float32 [pairs], both on x's device.
    """
    _contiguous(x)
    tokens, heads, width = x.shape
    pairs = frequencies.shape[0]
    if 2 * pairs > width or positions.shape != (tokens,):
        raise BackendError(f"{pairs} pairs and {list(positions.shape)} positions for x {list(x.shape)}")
    out = torch.empty_like(x)
    rest = width - 2 * pairs
    if x.numel():
        rope_kernel[(tokens * heads,)](
            x, positions, frequencies, out, heads, width, pairs, factor,
            BLOCK=triton.next_power_of_2(pairs), REST=triton.next_power_of_2(max(rest, 1)),
            INTERLEAVED=pairing == "interleaved", HAS_REST=rest > 0, num_warps=1,
        )  # fmt: skip
    return out


def swiglu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up of two contiguous tensors of one shape."""
    _contiguous(gate, up)
    if gate.shape != up.shape:
        raise BackendError(f"gate {list(gate.shape)} and up {list(up.shape)} differ in shape")
    out = torch.empty_like(gate)
    if gate.numel():
        swiglu_kernel[(triton.cdiv(gate.numel(), ELEMENTS),)](gate, up, out, gate.numel(), BLOCK=ELEMENTS)
    return out


def cache_write(rows: torch.Tensor, slots: torch.Tensor, cache: torch.Tensor, column: int = 0) -> None:
    """Write rows [T, ...] into cache [slots, ...] at int64 `slots` [T]; a negative slot is skipped.

    Args:
        column: where in a cache row they begin: a latent cache holds the latent, then the rotary key.
    """
    _contiguous(rows, cache)
    tokens = rows.shape[0]
    width, stride = rows[0].numel() if tokens else 0, cache[0].numel()
    if slots.shape != (tokens,) or column + width > stride:
        raise BackendError(
            f"rows {list(rows.shape)} from column {column} on and slots {list(slots.shape)} do not fit a cache "
            f"{list(cache.shape)}"
        )
    if width:
        cache_write_kernel[(tokens, triton.cdiv(width, ELEMENTS))](
            rows, slots, cache, width, stride, column, BLOCK=ELEMENTS
        )


def _contiguous(*tensors: torch.Tensor) -> None:
    for tensor in tensors:
        if not tensor.is_contiguous():
            raise BackendError(f"a tensor {list(tensor.shape)} with strides {list(tensor.stride())} is not contiguous")
