"""Launches of the residual streams' kernels; all tensors are contiguous float32 on the device."""

from __future__ import annotations

import torch
import triton

from ktcore.errors import BackendError
from ktcore_triton.kernels.streams import connect_kernel, gate_kernel, leave_kernel, stream_norm_kernel

COLUMNS = 512
"""Columns of a stream that a program has in registers."""


def connect(
    x: torch.Tensor, z: torch.Tensor, base: torch.Tensor, scale: torch.Tensor, streams: int,
    eps: float, rms_eps: float, rounds: int,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """What a branch reads of streams x [T, streams * hidden], as `HyperConnectionSpec` says, and what `leave` needs.

    Args:
        z: [T, rows], fn x of x as it is; base: [rows]; rows are streams * (2 + streams), or streams for the end.
        scale: [parts].

    Returns:
        [T, hidden] and [T, streams * (1 + streams)], of the end [T, 0].
    """
    _check(x, z, base, scale)
    tokens, hidden = x.shape[0], x.shape[1] // streams
    rows = base.shape[0]
    mixed = rows != streams
    if rows not in (streams, streams * (2 + streams)) or z.shape != (tokens, rows) or x.shape[1] != streams * hidden:
        raise BackendError(f"streams {list(x.shape)} of {streams}, {list(z.shape)} products, {rows} base values")
    out = torch.empty((tokens, hidden), device=x.device)
    carry = torch.empty((tokens, streams * (1 + streams) if mixed else 0), device=x.device)
    if tokens:
        connect_kernel[(tokens,)](
            x, z, base, scale, out, carry if mixed else out, hidden, eps, rms_eps, rounds,
            STREAMS=streams, BLOCK_S=triton.next_power_of_2(streams), BLOCK=COLUMNS, MIXED=mixed, num_warps=8,
        )  # fmt: skip
    return out, carry


def leave(x: torch.Tensor, y: torch.Tensor, carry: torch.Tensor, streams: int) -> torch.Tensor:
    """Streams [T, streams * hidden] after a branch gave y [T, hidden].

    Args:
        carry: of `connect`; or [T, streams], what each stream takes of y, and then each stays what it is beside.
    """
    _check(x, y, carry)
    tokens, hidden = y.shape
    if x.shape != (tokens, streams * hidden) or carry.shape[1] not in (streams, streams * (1 + streams)):
        raise BackendError(f"streams {list(x.shape)}, a result {list(y.shape)} and weights {list(carry.shape)}")
    out = torch.empty_like(x)
    if tokens:
        leave_kernel[(tokens, triton.cdiv(hidden, COLUMNS))](
            x, y, carry, out, hidden, STREAMS=streams, BLOCK_S=triton.next_power_of_2(streams), BLOCK=COLUMNS,
            MIXED=carry.shape[1] != streams,
        )  # fmt: skip
    return out


def stream_norm(x: torch.Tensor, weight: torch.Tensor, streams: int, eps: float) -> torch.Tensor:
    """As `ktcore.ops.streams.stream_norm`: x [T, streams * hidden], weight [streams * hidden]."""
    _check(x, weight)
    hidden = x.shape[1] // streams
    out = torch.empty_like(x)
    if x.numel():
        stream_norm_kernel[(x.shape[0] * streams,)](
            x, weight, out, hidden, eps, STREAMS=streams, BLOCK=triton.next_power_of_2(hidden),
            num_warps=8 if hidden > 2048 else 4,
        )  # fmt: skip
    return out


def gated_mean(normed: torch.Tensor, up: torch.Tensor, streams: int) -> torch.Tensor:
    """The mean over streams of sigmoid(up) * normed, both [T, streams * hidden]: [T, hidden]."""
    _check(normed, up)
    tokens, hidden = normed.shape[0], normed.shape[1] // streams
    out = torch.empty((tokens, hidden), device=normed.device)
    if tokens:
        gate_kernel[(tokens, triton.cdiv(hidden, 1024))](normed, up, out, hidden, STREAMS=streams, BLOCK=1024)
    return out


def _check(*tensors: torch.Tensor) -> None:
    for tensor in tensors:
        if tensor.dtype != torch.float32 or not tensor.is_contiguous():
            raise BackendError(f"a tensor {list(tensor.shape)} of {tensor.dtype}: contiguous float32 is needed")
