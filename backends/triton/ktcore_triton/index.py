"""Launches of the indexers' kernels: which tokens or pools of a paged cache each query attends to."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton

from ktcore.errors import BackendError
from ktcore_triton.attention import Pages
from ktcore_triton.dtypes import compute_type
from ktcore_triton.kernels.index import best_kernel, choose_kernel, pools_kernel, scores_kernel

MOST_SCORES = 1 << 25
"""Scores that are held at a time: 128 MiB."""
KEYS, QUERIES = 64, 16
CHOICE = 2048
"""Scores that a program of the choice looks at at a time."""


@dataclass(frozen=True)
class Choice:
    """What is chosen.

    Attributes:
        top: rows of keys; width: tokens of a line of the result.
        pool: tokens of a row.
        tail: the tokens behind the last complete row are always chosen; without it, the row that is not complete can
            be chosen too, and the last `local` rows always are.
    """

    top: int
    width: int
    pool: int = 1
    tail: bool = True
    local: int = 0


def choose(
    q: torch.Tensor,
    weights: torch.Tensor | None,
    keys: torch.Tensor,
    pages: Pages,
    positions: torch.Tensor,
    choice: Choice,
    compute: torch.dtype,
) -> torch.Tensor:
    """The tokens of the rows with the highest sum over heads of weight * relu(q . key): int32 [T, width].

    Args:
        q: [T, heads, dim]; weights: float32 [T, heads], None: all 1; keys: [rows, dim], `choice.pool` slots a row.
        positions: int64 [T], on the device.
        compute: type that products are computed in.
    """
    tokens, heads, dim = q.shape
    if keys.shape[1] != dim or (weights is not None and weights.shape != (tokens, heads)):
        raise BackendError(f"queries {list(q.shape)} and keys {list(keys.shape)} do not fit, or their weights")
    if pages.page_size % choice.pool or positions.shape != (tokens,):
        raise BackendError(f"pools of {choice.pool} in pages of {pages.page_size}, {list(positions.shape)} positions")
    out = torch.empty((tokens, choice.width), dtype=torch.int32, device=q.device)
    page_rows = pages.page_size // choice.pool
    stride = max(1, pages.table.shape[1] * page_rows)
    step = max(1, MOST_SCORES // stride)
    few = 1 if pages.most_queries == 1 else QUERIES
    grid = (triton.cdiv(stride, KEYS), triton.cdiv(pages.most_queries, few), pages.context_lens.shape[0])
    for first in range(0, tokens, step):
        last = min(first + step, tokens)
        scores = torch.empty((last - first, stride), dtype=torch.float32, device=q.device)
        scores_kernel[grid](
            q, scores if weights is None else weights, keys, scores, pages.q_start, pages.context_lens, pages.table,
            first, last, pages.table.stride(0), page_rows, stride, choice.pool, choice.top,
            HEADS=heads, DIM=dim, BLOCK_H=max(16, triton.next_power_of_2(heads)),
            BLOCK_D=max(16, triton.next_power_of_2(dim)), BLOCK_N=KEYS, QUERIES=few, WEIGHED=weights is not None,
            COMPUTE=compute_type(compute), num_warps=8, num_stages=1,
        )  # fmt: skip
        choose_lines(scores, positions, choice, out, first, 1)
    return out


def choose_best(
    q: torch.Tensor,
    keys: torch.Tensor,
    pages: Pages,
    positions: torch.Tensor,
    choice: Choice,
    compute: torch.dtype,
) -> torch.Tensor:
    """The tokens of the pools that hold the largest q . key, of each head: int32 [T, heads, width].

    Args:
        q: [T, heads, dim]; keys: [slots, dim], of tokens; positions: int64 [T], on the device.
        choice: without a tail.
        compute: type that products are computed in.
    """
    tokens, heads, dim = q.shape
    if keys.shape[1] != dim or positions.shape != (tokens,):
        raise BackendError(f"queries {list(q.shape)}, keys {list(keys.shape)}, {list(positions.shape)} do not fit")
    out = torch.empty((tokens, heads, choice.width), dtype=torch.int32, device=q.device)
    stride = max(1, triton.cdiv(pages.table.shape[1] * pages.page_size, choice.pool))
    step = max(1, MOST_SCORES // (stride * heads))
    few = 1 if pages.most_queries == 1 else QUERIES
    grid = (stride, triton.cdiv(pages.most_queries, few), pages.context_lens.shape[0])
    for first in range(0, tokens, step):
        last = min(first + step, tokens)
        scores = torch.empty(((last - first) * heads, stride), dtype=torch.float32, device=q.device)
        best_kernel[grid](
            q, keys, scores, pages.q_start, pages.context_lens, pages.table, first, last, pages.table.stride(0),
            pages.page_size, stride, choice.top, HEADS=heads, DIM=dim,
            BLOCK_H=max(16, triton.next_power_of_2(heads)), BLOCK_D=max(16, triton.next_power_of_2(dim)),
            BLOCK_N=max(16, triton.next_power_of_2(choice.pool)), POOL=choice.pool, QUERIES=few,
            COMPUTE=compute_type(compute), num_warps=8, num_stages=1,
        )  # fmt: skip
        choose_lines(scores, positions, choice, out, first, heads)
    return out


def choose_lines(
    scores: torch.Tensor, positions: torch.Tensor, choice: Choice, out: torch.Tensor, first: int, lines: int
) -> None:
    """The choice by scores float32 [tokens * lines, stride] of tokens from `first` on, into out [T * lines, width]."""
    choose_kernel[(scores.shape[0],)](
        scores, positions, out, first, scores.shape[1], choice.top, choice.width, choice.local,
        ROWS=lines, POOL=choice.pool, BLOCK_P=triton.next_power_of_2(choice.pool),
        BLOCK=max(16, CHOICE // triton.next_power_of_2(choice.pool)), TAIL=choice.tail, num_warps=8,
    )  # fmt: skip


def pool_gated(
    keys: torch.Tensor, gates: torch.Tensor, pooled: torch.Tensor, slots: torch.Tensor, positions: torch.Tensor
) -> None:
    """Store the keys of the pools that end with a token at `positions` int64 [T] in `slots` int64 [T].

    Args:
        keys, gates: [slots, dim], of tokens; pooled: [slots / pool, dim].
    """
    pool, dim = keys.shape[0] // max(1, pooled.shape[0]), keys.shape[1]
    pools_kernel[(slots.shape[0],)](
        keys, gates, pooled, pooled, slots, positions, DIM=dim, POOL=pool, BLOCK_P=triton.next_power_of_2(pool),
        BLOCK_D=triton.next_power_of_2(dim), GATED=True,
    )  # fmt: skip


def pool_means(keys: torch.Tensor, pool: int, slots: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """float32 [T, dim]: in the row of a token that ends a pool the mean of the pool's keys [slots, dim], else 0."""
    means = torch.zeros((slots.shape[0], keys.shape[1]), dtype=torch.float32, device=keys.device)
    pools_kernel[(slots.shape[0],)](
        keys, keys, keys, means, slots, positions, DIM=keys.shape[1], POOL=pool,
        BLOCK_P=triton.next_power_of_2(pool), BLOCK_D=triton.next_power_of_2(keys.shape[1]), GATED=False,
    )  # fmt: skip
    return means
