"""Paged KV cache: stores keys and values and attends over them, so that the layout is its own affair."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from ktcore.ops.base import Spec
from ktcore.ops.batch import StepBatch


@dataclass(frozen=True)
class KVCacheSpec(Spec):
    """One layer's cache.

    kind "gqa": `append(step, k [T, kv_heads, key_dim], v [T, kv_heads, value_dim])`, and
    `attend(step, q [T, heads, key_dim], scale) -> [T, heads, value_dim]`.
    kind "mla": the latent cache of DeepSeek-V2 (arXiv 2405.04434, section 2.1): kv_heads is 1, a row holds the latent
    (value_dim values) and then the shared rotary key (key_dim - value_dim values):
    `append(step, latent [T, value_dim], k_rope [T, key_dim - value_dim])`, and
    `attend(step, q [T, heads, key_dim], scale) -> [T, heads, value_dim]`, q holding the absorbed part first.

    With `sinks`, `attend` takes a fourth argument, float32 [heads]: a logit of every head that joins the softmax's
    denominator and has no value. With `chosen` it takes `chosen=`, int32 [T, n]: the positions that each query sees,
    and no others; -1 stands behind them, where there are fewer than n. Or int32 [T, kv_heads, n]: those that the heads
    of each key head see.

    Attributes:
        window: keys older than this many tokens are masked; 0 means all are seen.
        chunk: positions lie in chunks of this many, and a query sees keys of its own chunk only; 0 means all are seen.
    """

    op: ClassVar[str] = "kv_cache"
    kind: Literal["gqa", "mla"]
    heads: int
    kv_heads: int
    key_dim: int
    value_dim: int
    window: int = 0
    chunk: int = 0
    sinks: bool = False
    chosen: bool = False

    def bytes_per_token(self, element_bytes: int) -> int:
        """Cache bytes a token takes in this layer."""
        width = self.key_dim if self.kind == "mla" else self.kv_heads * (self.key_dim + self.value_dim)
        return width * element_bytes


def attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scale: float,
    window: int = 0,
    chunk: int = 0,
    sinks: torch.Tensor | None = None,
    chosen: torch.Tensor | None = None,
) -> torch.Tensor:
    """Causal attention of the last Tq of Lk tokens, bottom-right aligned: query i sees keys j <= i + Lk - Tq.

    Args:
        q: [Tq, heads, dk]; k: [Lk, kv_heads, dk]; v: [Lk, kv_heads, dv]; heads is a multiple of kv_heads, and query
            head h uses key head h // (heads // kv_heads).
        sinks: [heads], further logits without values.
        chosen: [Tq, n], or [Tq, kv_heads, n], keys that a query sees, if they are not later ones; -1 is none.

    Returns:
        [Tq, heads, dv], float32.
    """
    tq, heads, _ = q.shape
    lk, kv_heads, _ = k.shape
    group = heads // kv_heads
    kk, vv = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    scores = torch.einsum("qhd,khd->hqk", q.float(), kk.float()) * scale
    i = torch.arange(lk - tq, lk, device=q.device)[:, None]
    j = torch.arange(lk, device=q.device)[None, :]
    hidden = j > i
    if window:
        hidden |= j <= i - window
    if chunk:
        hidden |= j // chunk != i // chunk
    if chosen is not None:
        chosen = chosen.to(q.device)
        of_heads = chosen[:, None] if chosen.dim() == 2 else chosen.repeat_interleave(group, 1)
        hidden = hidden | ~among(of_heads, lk).transpose(0, 1)
    scores = scores.masked_fill(hidden, float("-inf"))
    if sinks is not None:
        scores = torch.cat((scores, sinks.float()[:, None, None].expand(-1, tq, 1)), -1)
    weights = scores.softmax(-1)[..., :lk]
    return torch.einsum("hqk,khd->qhd", weights, vv.float())


def among(chosen: torch.Tensor, length: int) -> torch.Tensor:
    """Whether each of `length` keys is in its row of `chosen` [..., n], -1 for none: bool [..., length]."""
    found = torch.zeros(*chosen.shape[:-1], length + 1, dtype=torch.bool, device=chosen.device)
    at = chosen.long()
    return found.scatter_(-1, at.masked_fill(at < 0, length), True)[..., :length]


def sequence_slots(step: StepBatch) -> Iterator[tuple[slice, torch.Tensor]]:
    """For each sequence: the span of its query tokens, and the slots int64 [context] of all its cached tokens."""
    for i in range(step.sequences):
        position = torch.arange(step.context_lens[i])
        page = step.block_table[i].long()[position // step.page_size]
        yield slice(step.q_start[i], step.q_start[i + 1]), page * step.page_size + position % step.page_size
