"""Token indexers with their keys on the device: composed of the projections that the rules chose."""

from __future__ import annotations

from typing import cast

import torch

from ktcore.backend import Capabilities, LoadRequest, Module, Supported, Unsupported
from ktcore.backend.branches import INDEXER, indexer_branch, step_positions
from ktcore.backend.loading import compute_dtype, on_device
from ktcore.backend.mirror import mirrored
from ktcore.backend.pages import check_pages
from ktcore.ops.batch import StepBatch
from ktcore.ops.indexer import IndexCacheSpec, TokenIndexerSpec
from ktcore_triton.operators.base import FLOAT_BYTES, HALF_BYTES, TritonImplementation
from ktcore_triton.operators.cache import PAGE_SIZES, step_pages


class TritonIndexCache(TritonImplementation):
    """Index keys in 16 bits, of tokens or of pools that a page holds whole; scores in float32."""

    spec_type = IndexCacheSpec
    handles = frozenset({"pool"})
    options = frozenset({"compute"})

    def supports(self, spec: IndexCacheSpec, device: Capabilities) -> Supported | Unsupported:
        """Where pools fit into pages."""
        if not self.page_sizes(spec):
            return Unsupported(f"pools of {spec.pool} tokens, of which no page holds a whole number")
        return super().supports(spec, device)

    def load(self, request: LoadRequest) -> Module:
        """No pages yet."""
        return TritonIndexCacheModule(request)

    def page_sizes(self, spec: IndexCacheSpec) -> tuple[int, ...]:
        """Whole pools."""
        return pages_of(spec.pool)

    def cache_bytes_per_token(self, spec: IndexCacheSpec) -> int:
        """16 bits a value."""
        return spec.bytes_per_token(HALF_BYTES)


def pages_of(pool: int) -> tuple[int, ...]:
    """Page sizes that hold whole pools of so many tokens, preferred first."""
    return tuple(size for size in PAGE_SIZES if size % max(pool, 1) == 0)


class IndexPages:
    """One layer's index keys, a row a token, and rows beside them of gates or of whole pools.

    Args:
        pool: tokens of a pool, 0: none; gated: whether each token has a row of gates, too.
    """

    def __init__(self, request: LoadRequest, dim: int, pool: int, gated: bool) -> None:
        self._name = request.name
        self._runtime = request.runtime
        self._compute = compute_dtype(request)
        self._dim, self._pool, self._gated = dim, pool, gated
        self._pages = self._page_size = 0
        self._keys = self._gates = self._pooled = torch.empty(0, device=request.runtime.device)

    def allocate_pages(self, pages: int, page_size: int) -> None:
        """Make room for `pages` pages of `page_size` tokens; earlier content is gone."""
        self._pages, self._page_size = pages, page_size
        # given back before the new ones are taken, or both would have to fit
        self._keys = self._gates = self._pooled = torch.empty(0, device=self._runtime.device)
        rows = pages * page_size
        self._keys = self._rows(rows)
        if self._pool:
            self._pooled = self._rows(rows // self._pool)
        if self._gated:
            self._gates = self._rows(rows)

    def page_tensors(self) -> tuple[torch.Tensor, ...]:
        """Keys of tokens, and where there are such gates and keys of pools."""
        held = (self._keys, *[self._gates] * self._gated, *[self._pooled] * bool(self._pool))
        return tuple(t.view(self._pages, -1) for t in held)

    def _rows(self, count: int) -> torch.Tensor:
        return torch.empty(count, self._dim, dtype=self._compute, device=self._runtime.device)

    def _store(self, step: StepBatch, rows: torch.Tensor, held: torch.Tensor) -> torch.Tensor:
        """Write rows [T, dim] of the step's tokens; gives their slots int64 [T] on the device."""
        from ktcore_triton.rows import cache_write

        check_pages(self._name, step, self._pages, self._page_size)
        slots = mirrored(self._runtime, step, "slots", StepBatch.slots)
        cache_write(rows.contiguous(), slots, held)
        return slots


class TritonIndexCacheModule(IndexPages):
    """Of a pool that is complete the key lies ready, made when its last token came."""

    def __init__(self, request: LoadRequest) -> None:
        self.spec = spec = cast(IndexCacheSpec, request.spec)
        super().__init__(request, spec.dim, spec.pool, bool(spec.pool))

    def append(self, step: StepBatch, keys: torch.Tensor, gates: torch.Tensor | None = None) -> None:
        """Store the keys [T, dim] of the step's tokens, and gates where keys are pooled."""
        from ktcore_triton.index import pool_gated

        slots = self._store(step, keys, self._keys)
        if gates is not None:
            self._store(step, gates, self._gates)
            pool_gated(self._keys, self._gates, self._pooled, slots, step_positions(self._runtime, step))

    def choose(self, step: StepBatch, q: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """int32 [T, width], as `IndexCacheSpec` says."""
        from ktcore_triton.index import Choice, choose

        check_pages(self._name, step, self._pages, self._page_size)
        s, pool = self.spec, max(self.spec.pool, 1)
        return choose(
            q.contiguous(),
            weights.contiguous(),
            self._pooled if s.pool else self._keys,
            step_pages(self._runtime, step),
            step_positions(self._runtime, step),
            Choice(s.top_k // pool, s.width, pool),
            self._compute,
        )


class TritonTokenIndexer(TritonImplementation):
    """Composed; LayerNorm in float32."""

    spec_type = TokenIndexerSpec
    handles = INDEXER | {"gate"}

    def load(self, request: LoadRequest) -> Module:
        """Bring the LayerNorm, and places in a pool, to the device; the parts hold the other weights."""
        ape = on_device(request, "ape") if cast(TokenIndexerSpec, request.spec).gate else None
        return indexer_branch(request, on_device(request, "k_norm"), on_device(request, "k_norm_bias"), ape)

    def packed_bytes(self, spec: TokenIndexerSpec, stored_bytes: int) -> int:
        """Float32."""
        return FLOAT_BYTES * (2 + spec.cache.pool) * spec.head_dim
