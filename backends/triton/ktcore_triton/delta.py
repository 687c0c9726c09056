"""Launches of the gated delta net's kernels over states in slots on a device."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton

from ktcore.errors import BackendError
from ktcore.ops.linear_attention import L2_EPS
from ktcore_triton.kernels.delta import chunks_kernel, convolution_kernel, recurrence_kernel
from ktcore_triton.tuning import DeltaTiles

FEW_TOKENS = 4
"""Up to so many new tokens a sequence goes through the recurrence, whatever else is in the step."""
CONV_TOKENS, CONV_CHANNELS = 16, 128
KEYS = 32
"""Rows of a state that a program has in registers when it goes by chunks."""


@dataclass(frozen=True)
class Runs:
    """A step's sequences on the device, and their states' slots.

    Attributes:
        q_start: int32 [n + 1]; slots: int64 [n]; starts: int32 [n], 1 where the state before the step is zero.
        least, most: new tokens of the shortest and the longest sequence.
    """

    q_start: torch.Tensor
    slots: torch.Tensor
    starts: torch.Tensor
    least: int
    most: int

    @property
    def sequences(self) -> int:
        """Number of sequences."""
        return self.slots.shape[0]


def convolution(x: torch.Tensor, weight: torch.Tensor, state: torch.Tensor, runs: Runs) -> torch.Tensor:
    """silu of the causal depthwise convolution of x float32 [T, channels]; `state` is updated.

    Args:
        weight: float32 [width, channels], the oldest token's first; state: float32 [slots, width - 1, channels].
    """
    channels, width = x.shape[1], weight.shape[0]
    _check(x, weight, state)
    if weight.shape[1] != channels or state.shape[1:] != (width - 1, channels) or width - 1 > CONV_TOKENS:
        raise BackendError(f"x {list(x.shape)}, weight {list(weight.shape)} and states {list(state.shape)} do not fit")
    out = torch.empty_like(x)
    if x.numel():
        block = 1 if runs.most == 1 else CONV_TOKENS
        grid = (triton.cdiv(runs.most, block), triton.cdiv(channels, CONV_CHANNELS), runs.sequences)
        convolution_kernel[grid](
            x, weight, state, runs.slots, runs.starts, runs.q_start, out, channels,
            WIDTH=width, BLOCK_W=triton.next_power_of_2(width - 1), BLOCK_T=block, BLOCK_C=CONV_CHANNELS,
        )  # fmt: skip
    return out


def delta_rule(
    mixed: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    decay: torch.Tensor,
    dt_bias: torch.Tensor,
    state: torch.Tensor,
    runs: Runs,
    key_heads: int,
    *,
    tiled: bool = False,
    tiles: DeltaTiles | None = None,
) -> torch.Tensor:
    """Outputs float32 [T, value_heads, value_dim]; `state` is updated.

    Args:
        mixed: float32 [T, 2 * key_heads * key_dim + value_heads * value_dim], queries, keys and values.
        a, b: float32 [T, value_heads], before softplus and sigmoid; decay, dt_bias: float32 [value_heads].
        state: float32 [slots, value_heads, key_dim, value_dim].
        tiled: as `GatedDeltaNetSpec` says.
    """
    _, heads, key, value = state.shape
    tokens = mixed.shape[0]
    _check(mixed, a, b, decay, dt_bias, state)
    if mixed.shape[1] != 2 * key_heads * key + heads * value or a.shape != (tokens, heads) or b.shape != a.shape:
        raise BackendError(f"rows {list(mixed.shape)}, {list(a.shape)} for states {list(state.shape)}")
    out = torch.empty(tokens, heads, value, device=mixed.device)
    if not tokens:
        return out
    tiles = tiles or DeltaTiles()
    arguments = (
        mixed, a, b, decay, dt_bias, state, runs.slots, runs.starts, runs.q_start, out,
        key_heads, heads, 1 if tiled else heads // key_heads, key**-0.5, L2_EPS, FEW_TOKENS,
    )  # fmt: skip
    grid = (triton.cdiv(value, tiles.block_v), heads, runs.sequences)
    shape = {"KEY": key, "VALUE": value, "BLOCK_V": tiles.block_v}
    if runs.least <= FEW_TOKENS:
        recurrence_kernel[grid](*arguments, **shape, BLOCK_K=triton.next_power_of_2(key), num_warps=4)
    if runs.most > FEW_TOKENS:
        chunks_kernel[grid](*arguments, **shape, BLOCK_K=KEYS, CHUNK=tiles.chunk, **tiles.launch.options())
    return out


def _check(*tensors: torch.Tensor) -> None:
    for tensor in tensors:
        if tensor.dtype != torch.float32 or not tensor.is_contiguous():
            raise BackendError(f"a tensor {list(tensor.shape)} of {tensor.dtype}: contiguous float32 is needed")
