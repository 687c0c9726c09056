"""Attention over chosen tokens of a paged cache: latents, or keys and values of key heads."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton

from ktcore.errors import BackendError
from ktcore_triton.attention import EVERYTHING, Pages, Sight
from ktcore_triton.dtypes import compute_type
from ktcore_triton.kernels.attention import merge_kernel
from ktcore_triton.kernels.chosen import chosen_kernel
from ktcore_triton.tuning import AttentionTiles, attention_tiles


@dataclass(frozen=True)
class Chosen:
    """Which tokens each query sees, on the device.

    Attributes:
        tokens: int32 [T, n] or, of each key head, [T, kv_heads, n]: positions that rise, then -1.
        positions: int64 [T], of the queries; sequences: int32 [T], the line of the table that each one reads.
    """

    tokens: torch.Tensor
    positions: torch.Tensor
    sequences: torch.Tensor


def chosen_attention(
    q: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor | None,
    chosen: Chosen,
    pages: Pages,
    scale: float,
    value_dim: int,
    *,
    sight: Sight = EVERYTHING,
    sinks: torch.Tensor | None = None,
    tiles: AttentionTiles | None = None,
    compute: torch.dtype | None = None,
) -> torch.Tensor:
    """Attention of each query over its chosen tokens, as `ktcore.ops.kv_cache.attend` for each sequence.

    Args:
        q: [T, heads, dk]; keys: [slots, kv_heads, dk]; values: [slots, kv_heads, dv]. Of latents, keys are [slots, dk],
            whose first `value_dim` values (a power of two) are the values, and `values` is None.
        tiles: those of attention over all: with them a choice of all tokens gives the same bits.

    Returns:
        [T, heads, value_dim] of q's type.
    """
    latent = values is None
    tokens, heads, key_dim = q.shape
    kv_heads = 1 if latent else keys.shape[1]
    listed = chosen.tokens.contiguous()
    rows = listed.shape[1] if listed.dim() == 3 else 1
    if keys.shape[-1] != key_dim or heads % kv_heads or listed.shape[0] != tokens or rows not in (1, kv_heads):
        raise BackendError(f"queries {list(q.shape)}, keys {list(keys.shape)}, chosen {list(listed.shape)} do not fit")
    if latent and value_dim != triton.next_power_of_2(value_dim):
        raise BackendError(f"latent attention takes a latent rank that is a power of two, not {value_dim}")
    out = torch.empty((tokens, heads, value_dim), dtype=q.dtype, device=q.device)
    if not tokens:
        return out
    group = heads // kv_heads
    tiles = tiles or attention_tiles(pages.most_queries * group, value_dim)
    block_m = min(tiles.block_m, max(16, triton.next_power_of_2(group)))
    whole = triton.next_power_of_2(value_dim if latent else key_dim)
    rest, main = triton.next_power_of_2(max(key_dim - whole, 16)), max(16, whole)
    split = tiles.splits > 1
    parts, lse = out, out
    if split:
        parts = torch.empty((tiles.splits, tokens, heads, value_dim), dtype=torch.float32, device=q.device)
        lse = torch.empty((tiles.splits, tokens, heads), dtype=torch.float32, device=q.device)
    values = keys if values is None else values
    block_v = max(16, triton.next_power_of_2(value_dim))
    chosen_kernel[(triton.cdiv(group, block_m), kv_heads * tiles.splits, tokens)](
        q, keys, values, q if sinks is None else sinks, parts, lse, listed, chosen.positions, chosen.sequences,
        pages.table, scale, heads, kv_heads, keys.stride(0), values.stride(0), pages.table.stride(0), pages.page_size,
        sight.window, sight.chunk, tiles.splits, tokens, listed.shape[-1], rows,
        GROUP=group, KEY_DIM=key_dim, MAIN=main, REST=rest, VALUE_DIM=value_dim, BLOCK_V=block_v, BLOCK_M=block_m,
        BLOCK_N=tiles.block_n, PART=min(tiles.part or main, main), LATENT=latent, HAS_SINKS=sinks is not None,
        SPLIT=split, COMPUTE=compute_type(compute or q.dtype), **tiles.launch.options(),
    )  # fmt: skip
    if split:
        merge_kernel[(tokens * heads,)](
            parts, lse, q if sinks is None else sinks, out, tokens * heads, heads, tiles.splits,
            VALUE_DIM=value_dim, BLOCK_V=block_v, BLOCK_S=triton.next_power_of_2(tiles.splits),
            HAS_SINKS=sinks is not None,
        )  # fmt: skip
    return out
