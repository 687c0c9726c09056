"""Attention over a paged cache: grouped queries, and the latent cache of MLA with absorbed queries."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton

from ktcore.errors import BackendError
from ktcore_triton.dtypes import compute_type
from ktcore_triton.kernels.attention import attention_kernel, merge_kernel
from ktcore_triton.tuning import AttentionTiles, attention_tiles


@dataclass(frozen=True)
class Pages:
    """A step's sequences on the device.

    Attributes:
        q_start: int32 [n + 1], offsets into the query tokens; context_lens: int32 [n], keys cached after this step.
        table: int32 [n, blocks], the page of each block of a sequence.
        page_size: tokens a page; most_queries: of any sequence, known on the host.
    """

    q_start: torch.Tensor
    context_lens: torch.Tensor
    table: torch.Tensor
    page_size: int
    most_queries: int


@dataclass(frozen=True)
class Sight:
    """What a query sees besides causality: a window of keys, its own chunk; 0 for all. As in `KVCacheSpec`."""

    window: int = 0
    chunk: int = 0


EVERYTHING = Sight()


def paged_attention(
    q: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    pages: Pages,
    scale: float,
    *,
    sight: Sight = EVERYTHING,
    sinks: torch.Tensor | None = None,
    tiles: AttentionTiles | None = None,
    compute: torch.dtype | None = None,
) -> torch.Tensor:
    """Causal attention of a ragged batch, bottom-right aligned; as `ktcore.ops.kv_cache.attend` for each sequence.

    Args:
        q: [T, heads, dk]; keys: [slots, kv_heads, dk]; values: [slots, kv_heads, dv]; all contiguous.
        sinks: [heads], further logits without values.
        compute: type that products are computed in, by default q's.

    Returns:
        [T, heads, dv] of q's type.
    """
    return _attend(q, keys, values, pages, scale, sight, sinks, tiles, compute, latent=False)


def latent_attention(
    q: torch.Tensor,
    cache: torch.Tensor,
    pages: Pages,
    scale: float,
    value_dim: int,
    *,
    tiles: AttentionTiles | None = None,
    compute: torch.dtype | None = None,
) -> torch.Tensor:
    """Absorbed attention of MLA over its latent cache: a row's first `value_dim` values are key and value at once.

    Args:
        q: [T, heads, value_dim + rope_dim], the absorbed part first; cache: [slots, value_dim + rope_dim].
        scale: of the head size before absorption.
        value_dim: a power of two (512 in DeepSeek-V2 and V3).

    Returns:
        [T, heads, value_dim] of q's type.
    """
    if value_dim != triton.next_power_of_2(value_dim):
        raise BackendError(f"latent attention takes a latent rank that is a power of two, not {value_dim}")
    rows = cache.view(cache.shape[0], 1, -1)
    return _attend(q, rows, rows[..., :value_dim], pages, scale, EVERYTHING, None, tiles, compute, latent=True)


def _attend(
    q: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    pages: Pages,
    scale: float,
    sight: Sight,
    sinks: torch.Tensor | None,
    tiles: AttentionTiles | None,
    compute: torch.dtype | None,
    latent: bool,
) -> torch.Tensor:
    tokens, heads, key_dim = q.shape
    kv_heads, value_dim = values.shape[1:]
    if keys.shape[1:] != (kv_heads, key_dim) or heads % kv_heads:
        raise BackendError(f"queries {list(q.shape)}, keys {list(keys.shape)}, values {list(values.shape)} do not fit")
    if not (q.is_contiguous() and keys.is_contiguous() and (latent or values.is_contiguous())):
        raise BackendError("queries, keys and values must be contiguous")
    out = torch.empty((tokens, heads, value_dim), dtype=q.dtype, device=q.device)
    if not tokens:
        return out
    group, sequences = heads // kv_heads, pages.context_lens.shape[0]
    tiles = tiles or attention_tiles(pages.most_queries * group, value_dim)
    whole = triton.next_power_of_2(value_dim if latent else key_dim)
    rest, main = triton.next_power_of_2(max(key_dim - whole, 16)), max(16, whole)
    split = tiles.splits > 1
    parts, lse = out, out
    if split:
        parts = torch.empty((tiles.splits, tokens, heads, value_dim), dtype=torch.float32, device=q.device)
        lse = torch.empty((tiles.splits, tokens, heads), dtype=torch.float32, device=q.device)
    grid = (triton.cdiv(pages.most_queries * group, tiles.block_m), kv_heads * tiles.splits, sequences)
    block_v = max(16, triton.next_power_of_2(value_dim))
    attention_kernel[grid](
        q, keys, values, q if sinks is None else sinks, parts, lse, pages.q_start, pages.context_lens, pages.table,
        scale, heads, kv_heads, keys.stride(0), values.stride(0), pages.table.stride(0), pages.page_size,
        sight.window, sight.chunk, tiles.splits, tokens,
        GROUP=group, KEY_DIM=key_dim, MAIN=main, REST=rest,
        VALUE_DIM=value_dim, BLOCK_V=block_v, BLOCK_M=tiles.block_m, BLOCK_N=tiles.block_n,
        PART=min(tiles.part or main, main), LATENT=latent, HAS_SINKS=sinks is not None, SPLIT=split,
        COMPUTE=compute_type(compute or q.dtype),
        **tiles.launch.options(),
    )  # fmt: skip
    if split:
        merge_kernel[(tokens * heads,)](
            parts, lse, q if sinks is None else sinks, out, tokens * heads, heads, tiles.splits,
            VALUE_DIM=value_dim, BLOCK_V=block_v, BLOCK_S=triton.next_power_of_2(tiles.splits),
            HAS_SINKS=sinks is not None,
        )  # fmt: skip
    return out
