"""The reference KV caches: float32 pages that remember which position they hold, so that a wrong page is an error."""

from __future__ import annotations

from collections.abc import Iterator
from typing import cast

import torch

from ktcore.backend.capabilities import Capabilities
from ktcore.backend.implementation import LoadRequest, Module, Support, Supported, Unsupported
from ktcore.backend.pages import check_page_size
from ktcore.backend.reference.base import FLOAT_BYTES, ReferenceImplementation
from ktcore.errors import BackendError
from ktcore.ops.batch import StepBatch
from ktcore.ops.indexer import IndexCacheSpec, choose_tokens, index_scores
from ktcore.ops.kv_cache import KVCacheSpec, attend
from ktcore.ops.pooled_index import choose_pools, pooled_keys

EMPTY = -1
PAGE_SIZES = (64, 16, 32, 128, 256)


class ReferenceKVCache(ReferenceImplementation):
    """Both kinds of cache, any page size."""

    id = "reference.kv_cache"
    spec_type = KVCacheSpec
    handles = frozenset({"window", "chunk", "sinks", "chosen"})

    def supports(self, spec: KVCacheSpec, device: Capabilities) -> Support:
        return Supported() if spec.kind in ("gqa", "mla") else Unsupported(f"cache kind {spec.kind} is unknown")

    def load(self, request: LoadRequest) -> Module:
        return PagedCache(request.name, cast(KVCacheSpec, request.spec), request.runtime.device)

    def page_sizes(self, spec: KVCacheSpec) -> tuple[int, ...]:
        return PAGE_SIZES

    def cache_bytes_per_token(self, spec: KVCacheSpec) -> int:
        return spec.bytes_per_token(FLOAT_BYTES)


class Pages:
    """One layer's rows in pages. Every slot remembers the position that was written into it, and reading checks it: a
    page that was never written, was written for an older block, or comes in the wrong order raises `BackendError`
    instead of giving wrong tokens.

    Args:
        width: values of a row.
    """

    def __init__(self, name: str, width: int, device: torch.device) -> None:
        self._name = name
        self._width = width
        self._device = device
        self._page_size = 0
        self._position = torch.empty(0, dtype=torch.int64)
        self._rows = torch.empty(0)

    def allocate_pages(self, pages: int, page_size: int) -> None:
        """Make room for `pages` pages of `page_size` tokens; earlier content is gone."""
        self._page_size = page_size
        self._position = torch.full((pages * page_size,), EMPTY)
        self._rows = torch.zeros(pages * page_size, self._width, device=self._device)

    def page_tensors(self) -> tuple[torch.Tensor, ...]:
        """The positions that slots hold [pages, page_size], and their rows [pages, page_size, width]."""
        rows = self._rows.view(-1, self._page_size, self._width)
        return self._position.view(-1, self._page_size), rows

    def store(self, step: StepBatch, rows: torch.Tensor) -> None:
        """Store rows [T, width] of the step's tokens."""
        slots = self._checked(step, step.slots())
        if rows.shape != (step.tokens, self._width):
            raise BackendError(f"{self._name}: {list(rows.shape)} values for {step.tokens} tokens do not fit the cache")
        self._position[slots] = step.positions
        self._rows[slots.to(self._device)] = rows.float()

    def gather(self, step: StepBatch) -> Iterator[tuple[slice, torch.Tensor]]:
        """For each sequence: the span of its query tokens, and its cached rows in order."""
        for i in range(step.sequences):
            span = slice(step.q_start[i], step.q_start[i + 1])
            yield span, self.rows_at(step, i, torch.arange(step.context_lens[i]))

    def rows_at(
        self, step: StepBatch, sequence: int, positions: torch.Tensor, columns: slice = slice(None)
    ) -> torch.Tensor:
        """Rows of a sequence's cached tokens at `positions` int64 [n], or some columns of them."""
        page = step.block_table[sequence].long()[positions // step.page_size]
        slots = self._checked(step, page * step.page_size + positions % step.page_size)
        stale = torch.nonzero(self._position[slots] != positions)
        if stale.numel():
            at, slot = int(positions[stale[0]]), int(slots[stale[0]])
            held = int(self._position[slot])
            what = "nothing was written there" if held == EMPTY else f"it holds position {held}"
            raise BackendError(f"{self._name}: position {at} is read from slot {slot}, but {what}")
        return self._rows[:, columns][slots.to(self._device)]

    def _checked(self, step: StepBatch, slots: torch.Tensor) -> torch.Tensor:
        check_page_size(self._name, step, self._page_size)
        if slots.numel() and not 0 <= int(slots.min()) <= int(slots.max()) < self._position.shape[0]:
            raise BackendError(f"{self._name}: the step uses a KV page that was not allocated")
        return slots


class PagedCache(Pages):
    """A row of a "gqa" cache is key and value of every head; of an "mla" cache latent and rope key."""

    def __init__(self, name: str, spec: KVCacheSpec, device: torch.device) -> None:
        super().__init__(name, spec.bytes_per_token(1), device)
        self.spec = spec

    def append(self, step: StepBatch, first: torch.Tensor, second: torch.Tensor) -> None:
        """Store keys and values, or latents and rope keys, of the step's tokens; shapes as in `KVCacheSpec`."""
        self.store(step, torch.cat((first.flatten(1), second.flatten(1)), 1))

    def attend(
        self,
        step: StepBatch,
        q: torch.Tensor,
        scale: float,
        sinks: torch.Tensor | None = None,
        chosen: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Causal attention of the step's queries over all that their sequences have cached -> [T, heads, value_dim]."""
        s = self.spec
        out = []
        for i, context in enumerate(step.context_lens):
            span = slice(step.q_start[i], step.q_start[i + 1])
            seen = None if chosen is None else chosen[span]
            if seen is not None and len(seen) == 1 and seen.shape[-1] < context and not (s.window or s.chunk):
                out.append(self._attend_few(step, i, q[span], scale, sinks, seen[0]))
                continue
            k, v = self._keys_values(self.rows_at(step, i, torch.arange(context)))
            out.append(attend(q[span], k, v, scale, s.window, s.chunk, sinks, seen))
        return torch.cat(out)

    def _keys_values(self, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        s = self.spec
        if s.kind == "mla":
            return rows[:, None, :], rows[:, None, : s.value_dim]
        keys = s.kv_heads * s.key_dim
        return rows[:, :keys].view(-1, s.kv_heads, s.key_dim), rows[:, keys:].view(-1, s.kv_heads, s.value_dim)

    def _attend_few(
        self, step: StepBatch, i: int, q: torch.Tensor, scale: float, sinks: torch.Tensor | None, seen: torch.Tensor
    ) -> torch.Tensor:
        """One token [1, heads, key_dim] of a long sequence: nothing is read but what it sees, [n] or [kv_heads, n]."""
        rows, kv_heads = seen.cpu().long(), self.spec.kv_heads
        group, out = q.shape[1] // kv_heads, []
        read = None if rows.dim() > 1 else self._keys_values(self.rows_at(step, i, rows[rows >= 0]))
        for g in range(kv_heads):
            k, v = read or self._keys_values(self.rows_at(step, i, rows[g][rows[g] >= 0]))
            own = slice(g * group, (g + 1) * group)
            scores = q[0, own].float() @ k[:, g].T * scale
            if sinks is not None:
                scores = torch.cat((scores, sinks[own, None].float()), 1)
            out.append(scores.softmax(-1)[:, : len(k)] @ v[:, g])
        return torch.cat(out)[None]


class ReferenceIndexCache(ReferenceImplementation):
    """Index keys of tokens or pools, any page size."""

    id = "reference.index_cache"
    spec_type = IndexCacheSpec
    handles = frozenset({"pool"})

    def load(self, request: LoadRequest) -> Module:
        return PagedIndex(request.name, cast(IndexCacheSpec, request.spec), request.runtime.device)

    def page_sizes(self, spec: IndexCacheSpec) -> tuple[int, ...]:
        return PAGE_SIZES

    def cache_bytes_per_token(self, spec: IndexCacheSpec) -> int:
        return FLOAT_BYTES * index_row(spec)


def index_row(spec: IndexCacheSpec) -> int:
    """Values of a row: a token's key, and its gates where keys are pooled."""
    return spec.dim * (2 if spec.pool else 1)


class PagedIndex(Pages):
    """A row is a token's index key, and its gates where keys are pooled: a pool's key is made anew for each choice."""

    def __init__(self, name: str, spec: IndexCacheSpec, device: torch.device) -> None:
        super().__init__(name, index_row(spec), device)
        self.spec = spec

    def append(self, step: StepBatch, keys: torch.Tensor, gates: torch.Tensor | None = None) -> None:
        """Store the keys [T, dim] of the step's tokens, and gates where keys are pooled."""
        self.store(step, keys if gates is None else torch.cat((keys, gates), 1))

    def choose(self, step: StepBatch, q: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """int32 [T, width], as `IndexCacheSpec` says."""
        s = self.spec
        out = []
        for span, keys in self.gather(step):
            if s.pool:
                pooled = pooled_keys(keys[:, : s.dim], keys[:, s.dim :], s.pool)
                out.append(choose_pools(q[span], weights[span], pooled, step.positions[span], len(keys), s))
                continue
            scores = index_scores(q[span], weights[span], keys)
            out.append(choose_tokens(scores, step.positions[span], self.spec.top_k))
        return torch.cat(out)
