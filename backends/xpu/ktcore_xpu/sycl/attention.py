"""Attention over a paged cache by SYCL kernels: grouped queries, and the latent cache of MLA with absorbed queries."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ktcore.errors import BackendError
from ktcore_xpu.sycl.launcher import LANES, TYPES, Define, Launcher

HEADS = 8
"""At most so many query heads share a work-group's tile of keys."""
MOST_SPLITS = 16
KEYS_A_SPLIT = 128


@dataclass(frozen=True)
class Places:
    """Where a step's query tokens look, on the device.

    Attributes:
        sequence: int32 [T], each token's row of the table; visible: int32 [T], keys up to and with its own.
        table: int32 [n, blocks], the page of each block of a sequence.
        page_size: tokens a page.
    """

    sequence: torch.Tensor
    visible: torch.Tensor
    table: torch.Tensor
    page_size: int


def attention(
    launcher: Launcher,
    q: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor | None,
    places: Places,
    scale: float,
    value_dim: int,
    *,
    window: int = 0,
    chunk: int = 0,
    sinks: torch.Tensor | None = None,
    splits: int | None = None,
) -> torch.Tensor:
    """Causal attention; as `ktcore.ops.kv_cache.attend` for each sequence. Sums are in float32.

    Args:
        q: float32 [T, heads, key_dim]; keys: [slots, kv_heads, key_dim] of any float type.
        values: [slots, kv_heads, value_dim] of the same type; None for a latent cache, whose rows hold the value first.
        sinks: float32 [heads], logits without values.
        splits: parts of the keys that run apart; by default as many as the table's width gives work for, which is the
            same in every step of a captured graph.

    Returns:
        float32 [T, heads, value_dim].

    Raises:
        BackendError: widths that are no multiple of 16, or types that do not fit.
    """
    tokens, heads, key_dim = q.shape
    kv_heads = keys.shape[1]
    if (
        key_dim % LANES
        or value_dim % LANES
        or heads % kv_heads
        or keys.shape[2] != key_dim
        or key_dim < value_dim * (values is None)
    ):
        raise BackendError(
            f"attention of {heads} heads of {key_dim} over keys {list(keys.shape)} with values of {value_dim}: "
            f"widths must be multiples of {LANES}, heads of the cache's"
        )
    if q.dtype != torch.float32 or (values is not None and values.dtype != keys.dtype):
        raise BackendError(f"queries in {q.dtype}, keys in {keys.dtype}: queries must be float32, the cache one type")
    group = heads // kv_heads
    together = min(HEADS, group)
    blocks = places.table.shape[1]
    splits = splits or max(1, min(MOST_SPLITS, blocks * places.page_size // KEYS_A_SPLIT))
    parts = torch.empty((tokens, heads, splits, value_dim), dtype=torch.float32, device=q.device)
    stats = torch.empty((tokens, heads, splits, 2), dtype=torch.float32, device=q.device)
    out = torch.empty((tokens, heads, value_dim), dtype=torch.float32, device=q.device)
    macros: dict[str, Define] = {"CACHE": TYPES[keys.dtype], "KEY": key_dim, "VALUE": value_dim, "HEADS": together}
    kernel = launcher.kernel("attention.cpp", "attend", LATENT=values is None, **macros)
    launcher.launch(
        kernel,
        (tokens, kv_heads * -(-group // together), splits),
        together * LANES,
        q, keys, keys if values is None else values, places.sequence, places.visible, places.table, parts, stats,
        heads, kv_heads, blocks, places.page_size, splits, window, chunk, float(scale),
    )  # fmt: skip
    kernel = launcher.kernel("attention.cpp", "merge", LATENT=values is None, **macros)
    launcher.launch(kernel, (tokens, heads, 1), LANES, parts, stats, sinks, out, heads, splits)
    return out
