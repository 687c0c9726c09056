"""The reference of the cache behind a block indexer: float32 rows that remember which position they hold."""

from __future__ import annotations

from typing import cast

import torch

from ktcore.backend.implementation import LoadRequest, Module
from ktcore.backend.reference.base import FLOAT_BYTES, ReferenceImplementation
from ktcore.backend.reference.cache import PAGE_SIZES, Pages
from ktcore.ops.batch import StepBatch
from ktcore.ops.block_indexer import BlockIndexCacheSpec, block_means, choose_blocks, max_scores, mean_scores


class ReferenceBlockIndexCache(ReferenceImplementation):
    """Index keys of tokens and of complete blocks, any page size."""

    id = "reference.block_index_cache"
    spec_type = BlockIndexCacheSpec
    handles = frozenset({"local"})

    def load(self, request: LoadRequest) -> Module:
        return PagedBlocks(request.name, cast(BlockIndexCacheSpec, request.spec), request.runtime.device)

    def page_sizes(self, spec: BlockIndexCacheSpec) -> tuple[int, ...]:
        return PAGE_SIZES

    def cache_bytes_per_token(self, spec: BlockIndexCacheSpec) -> int:
        return FLOAT_BYTES * row_width(spec)


def row_width(spec: BlockIndexCacheSpec) -> int:
    """Values of a row: a token's key, and behind it room for that of the block which the token ends."""
    return spec.dim * (2 if spec.pool == "mean" else 1)


class PagedBlocks(Pages):
    """A row is a token's index key and, of a block's last token, the block's: storing a token again, after a guess was
    taken back, makes the block's key anew."""

    def __init__(self, name: str, spec: BlockIndexCacheSpec, device: torch.device) -> None:
        super().__init__(name, row_width(spec), device)
        self.spec = spec

    def append(self, step: StepBatch, keys: torch.Tensor) -> torch.Tensor | None:
        """Store keys [T, dim]; by "mean", the means of the blocks that they end, as `BlockIndexCacheSpec` says."""
        s = self.spec
        if s.pool == "max":
            self.store(step, keys)
            return None
        self.store(step, torch.cat((keys, torch.zeros_like(keys)), 1))
        means = torch.zeros_like(keys, dtype=torch.float32)
        for i in range(step.sequences):
            first = step.q_start[i]
            at = step.positions[first : step.q_start[i + 1]]
            ends = torch.nonzero(at % s.block == s.block - 1)[:, 0]
            tokens = (at[ends, None] + torch.arange(1 - s.block, 1)).flatten()
            rows = self.rows_at(step, i, tokens, slice(0, s.dim))
            means[(ends + first).to(keys.device)] = block_means(rows, s.block)
        return means

    def complete(self, step: StepBatch, keys: torch.Tensor) -> None:
        """Store the keys of blocks in the rows of the tokens that end them."""
        s = self.spec
        ends = torch.nonzero(step.positions % s.block == s.block - 1)[:, 0]
        slots = self._checked(step, step.slots()[ends]).to(self._device)
        self._rows[slots, s.dim :] = keys[ends.to(keys.device)].float()

    def choose(self, step: StepBatch, q: torch.Tensor) -> torch.Tensor:
        """As `BlockIndexCacheSpec` says."""
        s = self.spec
        out = []
        for i, context in enumerate(step.context_lens):
            span = slice(step.q_start[i], step.q_start[i + 1])
            at = step.positions[span]
            if s.pool == "mean":
                ends = torch.arange(context)[s.block - 1 :: s.block]
                scores = mean_scores(q[span], self.rows_at(step, i, ends, slice(s.dim, None)))
            else:
                scores = max_scores(q[span], self.rows_at(step, i, torch.arange(context)), at, s.block)
            out.append(choose_blocks(scores, at, context, s))
        return torch.cat(out)
