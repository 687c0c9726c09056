"""Block indexers with their keys on the device: composed of the projections that the rules chose."""

from __future__ import annotations

from typing import cast

import torch

from ktcore.backend import Capabilities, LoadRequest, Module, Supported, Unsupported
from ktcore.backend.branches import block_indexer_branch, step_positions
from ktcore.backend.mirror import mirrored
from ktcore.backend.pages import check_pages
from ktcore.ops.batch import StepBatch
from ktcore.ops.block_indexer import BlockIndexCacheSpec, BlockIndexerSpec
from ktcore_triton.operators.base import HALF_BYTES, TritonImplementation
from ktcore_triton.operators.cache import PAGE_SIZES, step_pages
from ktcore_triton.operators.index import IndexPages, pages_of


class TritonBlockIndexCache(TritonImplementation):
    """Index keys in 16 bits, of tokens and of complete blocks that a page holds whole; scores in float32."""

    spec_type = BlockIndexCacheSpec
    handles = frozenset({"local"})
    options = frozenset({"compute"})

    def supports(self, spec: BlockIndexCacheSpec, device: Capabilities) -> Supported | Unsupported:
        """Where blocks with keys of their own fit into pages."""
        if not self.page_sizes(spec):
            return Unsupported(f"blocks of {spec.block} tokens, of which no page holds a whole number")
        return super().supports(spec, device)

    def load(self, request: LoadRequest) -> Module:
        """No pages yet."""
        return TritonBlockIndexCacheModule(request)

    def page_sizes(self, spec: BlockIndexCacheSpec) -> tuple[int, ...]:
        """Whole blocks, where these have keys."""
        return pages_of(spec.block) if spec.pool == "mean" else PAGE_SIZES

    def cache_bytes_per_token(self, spec: BlockIndexCacheSpec) -> int:
        """16 bits a value."""
        return spec.bytes_per_token(HALF_BYTES)


class TritonBlockIndexCacheModule(IndexPages):
    """Beside the keys of tokens, by "mean", a row for each block of a page."""

    def __init__(self, request: LoadRequest) -> None:
        self.spec = spec = cast(BlockIndexCacheSpec, request.spec)
        super().__init__(request, spec.dim, spec.block if spec.pool == "mean" else 0, gated=False)

    def append(self, step: StepBatch, keys: torch.Tensor) -> torch.Tensor | None:
        """Store keys [T, dim]; by "mean", the means of the blocks that they end, as `BlockIndexCacheSpec` says."""
        from ktcore_triton.index import pool_means

        slots = self._store(step, keys, self._keys)
        if self.spec.pool == "max":
            return None
        return pool_means(self._keys, self.spec.block, slots, step_positions(self._runtime, step))

    def complete(self, step: StepBatch, keys: torch.Tensor) -> None:
        """Store the keys [T, dim] of blocks, in the rows of the tokens that end them."""
        from ktcore_triton.rows import cache_write

        check_pages(self._name, step, self._pages, self._page_size)
        block = self.spec.block
        rows = mirrored(self._runtime, step, f"ends of blocks of {block}", lambda s: _ends(s, block))
        cache_write(keys.contiguous(), rows, self._pooled)

    def choose(self, step: StepBatch, q: torch.Tensor) -> torch.Tensor:
        """As `BlockIndexCacheSpec` says."""
        from ktcore_triton.index import Choice, choose, choose_best

        check_pages(self._name, step, self._pages, self._page_size)
        s, q = self.spec, q.contiguous()
        pages, positions = step_pages(self._runtime, step), step_positions(self._runtime, step)
        if s.pool == "mean":
            mean = Choice(s.top, s.width, s.block, local=s.local)
            return choose(q, None, self._pooled, pages, positions, mean, self._compute)
        best = Choice(s.top, s.width, s.block, tail=False, local=s.local)
        return choose_best(q, self._keys, pages, positions, best, self._compute)


def _ends(step: StepBatch, block: int) -> torch.Tensor:
    """int64 [T]: the row of the block that a token ends, -1 of other tokens."""
    return torch.where(step.positions % block == block - 1, step.slots() // block, -1)


class TritonBlockIndexer(TritonImplementation):
    """Composed: the parts hold the weights."""

    spec_type = BlockIndexerSpec

    def load(self, request: LoadRequest) -> Module:
        """Nothing to pack."""
        return block_indexer_branch(request)
