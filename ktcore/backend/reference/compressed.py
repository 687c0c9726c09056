"""References of attention over a window and compressed entries, and of its caches, which check what they read."""

from __future__ import annotations

from collections.abc import Iterator
from typing import cast

import torch

from ktcore.backend.capabilities import Capabilities
from ktcore.backend.compressed import COMPRESSED, compressed_branch, entry_indexer_branch
from ktcore.backend.implementation import LoadRequest, Module, Support, Supported
from ktcore.backend.open_windows import OpenWindows, closings, page_entries, places, spans
from ktcore.backend.pages import check_page_size
from ktcore.backend.reference.base import FLOAT_BYTES, ReferenceImplementation, loaded
from ktcore.backend.reference.cache import EMPTY, PAGE_SIZES
from ktcore.backend.reference.linear_attention import StateSlots
from ktcore.errors import BackendError
from ktcore.ops.batch import StepBatch
from ktcore.ops.compressed import (
    CompressedAttentionSpec,
    EntryCacheSpec,
    EntryIndexerSpec,
    Seen,
    WindowCacheSpec,
    weighed,
)
from ktcore.ops.indexer import choose_tokens, index_scores
from ktcore.ops.kv_cache import among
from ktcore.ops.linear_attention import StateCacheSpec


class ReferenceCompressedAttention(ReferenceImplementation):
    """Composed of its projections and caches."""

    id = "reference.compressed_attention"
    spec_type = CompressedAttentionSpec
    handles = COMPRESSED

    def load(self, request: LoadRequest) -> Module:
        spec = cast(CompressedAttentionSpec, request.spec)
        ape = loaded(request, "ape") if spec.entries else None
        return compressed_branch(request, loaded(request, "o_a"), loaded(request, "sinks"), ape)

    def packed_bytes(self, spec: CompressedAttentionSpec, stored_bytes: int) -> int:
        o_a = spec.o_rank * spec.heads * spec.head_dim
        ape = spec.entries.ratio * spec.entries.width if spec.entries else 0
        return FLOAT_BYTES * (o_a + spec.heads + ape)


class ReferenceEntryIndexer(ReferenceImplementation):
    """Chooses entries by index scores."""

    id = "reference.entry_indexer"
    spec_type = EntryIndexerSpec

    def load(self, request: LoadRequest) -> Module:
        return entry_indexer_branch(request, loaded(request, "ape"))

    def packed_bytes(self, spec: EntryIndexerSpec, stored_bytes: int) -> int:
        return FLOAT_BYTES * spec.entries.ratio * spec.entries.width


class ReferenceWindowCache(ReferenceImplementation):
    """Float32 rings of keys."""

    id = "reference.window_cache"
    spec_type = WindowCacheSpec

    def supports(self, spec: WindowCacheSpec, device: Capabilities) -> Support:
        return Supported()

    def load(self, request: LoadRequest) -> Module:
        return WindowRing(request.name, cast(WindowCacheSpec, request.spec), request.runtime.device)

    def state_bytes(self, spec: WindowCacheSpec) -> int:
        return FLOAT_BYTES * spec.values


class ReferenceEntryCache(ReferenceImplementation):
    """Float32 entries in pages, float32 rings of the tokens of open windows."""

    id = "reference.entry_cache"
    spec_type = EntryCacheSpec
    handles = frozenset({"overlap", "top_k", "chosen"})

    def supports(self, spec: EntryCacheSpec, device: Capabilities) -> Support:
        return Supported()

    def load(self, request: LoadRequest) -> Module:
        return PagedEntries(request.name, cast(EntryCacheSpec, request.spec), request.runtime.device)

    def page_sizes(self, spec: EntryCacheSpec) -> tuple[int, ...]:
        return spec.pages(PAGE_SIZES)

    def cache_bytes_per_token(self, spec: EntryCacheSpec) -> int:
        return spec.bytes_per_token(FLOAT_BYTES)

    def state_bytes(self, spec: EntryCacheSpec) -> int:
        return FLOAT_BYTES * spec.values


class WindowRing(StateSlots):
    """The key of position p is row p mod window of its sequence's state."""

    def __init__(self, name: str, spec: WindowCacheSpec, device: torch.device) -> None:
        super().__init__(name, StateCacheSpec(((spec.window, spec.dim),)), device)
        self.spec = spec

    def attend(self, step: StepBatch, q: torch.Tensor, k: torch.Tensor, scale: float) -> Seen:
        """As `WindowCacheSpec` says."""
        window = self.spec.window
        (rings,) = self.read(step)
        out: list[Seen] = []
        for i, (span, before) in enumerate(spans(step)):
            ring, new = rings[i], k[span].float()
            old = torch.arange(max(0, before - window + 1), before, device=ring.device)
            keys = torch.cat((ring[old % window], new))
            at = torch.arange(before - len(old), step.context_lens[i], device=ring.device)
            own = at[len(old) :, None]
            hidden = (at > own) | (at <= own - window)
            scores = torch.einsum("thd,kd->thk", q[span].float(), keys) * scale
            out.append(weighed(scores.masked_fill(hidden[:, None], float("-inf")), keys))
            ring[at[-window:] % window] = keys[-window:]
        self.write(step, rings)
        return _joined(out)


class PagedEntries:
    """Every place of a page remembers the window whose entry it holds, and reading checks it."""

    def __init__(self, name: str, spec: EntryCacheSpec, device: torch.device) -> None:
        self.spec = spec
        self._name = name
        self._device = device
        self._open = OpenWindows(name, spec, device)
        self._page_size = self._pages = 0
        self._window = torch.empty(0, dtype=torch.int64)
        self._rows = torch.empty(0)
        self.pool = self._open.pool
        self.allocate_states = self._open.allocate_states
        self.copy_states = self._open.copy_states
        self.state_tensors = self._open.state_tensors

    def allocate_pages(self, pages: int, page_size: int) -> None:
        """Make room for `pages` pages of `page_size` tokens; earlier content is gone."""
        if page_size not in self.spec.pages((page_size,)):
            raise BackendError(f"{self._name}: windows of {self.spec.ratio} tokens do not fit pages of {page_size}")
        self._pages, self._page_size = pages, page_size
        count = pages * page_entries(page_size, self.spec.ratio)
        self._window = torch.full((count,), EMPTY)
        self._rows = torch.zeros(count, self.spec.dim, device=self._device)

    def page_tensors(self) -> tuple[torch.Tensor, ...]:
        """The windows that places hold [pages, n], and their entries [pages, n, dim]."""
        return self._window.view(self._pages, -1), self._rows.view(self._pages, -1, self.spec.dim)

    def append(self, step: StepBatch, entries: torch.Tensor) -> None:
        """Store the entries [m, dim] of the windows that close in the step."""
        found = closings(step, self.spec.ratio)
        where = self._allocated(found.places)
        self._window[where] = found.starts // self.spec.ratio
        self._rows[where.to(self._device)] = entries.float()

    def attend(self, step: StepBatch, q: torch.Tensor, scale: float, chosen: torch.Tensor | None = None) -> Seen:
        """As `EntryCacheSpec` says."""
        out: list[Seen] = []
        for span, rows, visible in self._sequences(step):
            hidden = torch.arange(len(rows), device=rows.device) >= visible[:, None]
            if chosen is not None:
                hidden |= ~among(chosen[span].to(rows.device), len(rows))
            scores = torch.einsum("thd,nd->thn", q[span].float(), rows) * scale
            out.append(weighed(scores.masked_fill(hidden[:, None], float("-inf")), rows))
        return _joined(out)

    def choose(self, step: StepBatch, q: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """As `EntryCacheSpec` says."""
        out = []
        for span, rows, visible in self._sequences(step):
            out.append(choose_tokens(index_scores(q[span], weights[span], rows), visible - 1, self.spec.top_k))
        return torch.cat(out)

    def _sequences(self, step: StepBatch) -> Iterator[tuple[slice, torch.Tensor, torch.Tensor]]:
        """For each sequence: the span of its tokens, its closed entries in order, how many each token sees [T]."""
        check_page_size(self._name, step, self._page_size)
        ratio = self.spec.ratio
        for i, (span, _) in enumerate(spans(step)):
            windows = range(step.context_lens[i] // ratio)
            where = self._allocated(places(step, i, windows, ratio))
            stale = torch.nonzero(self._window[where] != torch.arange(len(windows)))
            if stale.numel():
                at = int(stale[0])
                held = int(self._window[where[at]])
                what = "nothing was written there" if held == EMPTY else f"it holds entry {held}"
                raise BackendError(f"{self._name}: entry {at} is read from place {int(where[at])}, but {what}")
            visible = (step.positions[span] + 1) // ratio
            yield span, self._rows[where.to(self._device)], visible.to(self._device)

    def _allocated(self, where: torch.Tensor) -> torch.Tensor:
        if where.numel() and not 0 <= int(where.min()) <= int(where.max()) < self._window.shape[0]:
            raise BackendError(f"{self._name}: the step uses a KV page that was not allocated")
        return where


def _joined(parts: list[Seen]) -> Seen:
    return torch.cat([values for values, _ in parts]), torch.cat([logs for _, logs in parts])
