"""Backends that are wrong in attention over blocks: in a block's key, in its score, or in what is seen beside it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from ktcore.backend import LoadRequest
from ktcore.ops import BlockIndexCacheSpec, BlockIndexerSpec, KVCacheSpec, Spec, StepBatch
from ktcore.ops.block_indexer import mean_scores

from . import plain_indexers
from .mutants import Maker, named
from .plain import Cache
from .plain_indexers import Blocks


class WithoutRelu(Blocks):
    """Heads that point away count against a block."""

    def scores(self, q: torch.Tensor, slots: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
        return torch.einsum("thd,bd->tb", q, self.of_blocks[slots[self.spec.block - 1 :: self.spec.block]])


class RawKeys(Blocks):
    """A block's key is the mean itself, whatever was made of it."""

    def scores(self, q: torch.Tensor, slots: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
        whole = len(slots) // self.spec.block * self.spec.block
        return mean_scores(q, self.keys[slots[:whole]].view(-1, self.spec.block, 32).mean(1))


class WithoutTail(Blocks):
    """What no block is complete of is not seen."""

    def choose(self, step: StepBatch, q: torch.Tensor) -> torch.Tensor:
        found = super().choose(step, q)
        tail = (step.positions + 1) // self.spec.block * self.spec.block
        return found.masked_fill((found >= tail[:, None]) & (tail[:, None] > 0), -1)


class SeenEarly(Blocks):
    """By maximum, tokens behind a query count for the block that it is in."""

    def scores(self, q: torch.Tensor, slots: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
        return super().scores(q, slots, at // self.spec.block * self.spec.block + self.spec.block - 1)


class ByMean(Blocks):
    """A block counts by the mean of its tokens, not by the best."""

    def scores(self, q: torch.Tensor, slots: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
        each = torch.einsum("thd,ld->thl", q, self.keys[slots])
        return (
            torch.nn.functional.pad(each, (0, -len(slots) % self.spec.block))
            .unflatten(-1, (-1, self.spec.block))
            .mean(-1)
        )


class OneChoice(Blocks):
    """The first head's choice is everybody's."""

    def choose(self, step: StepBatch, q: torch.Tensor) -> torch.Tensor:
        found = super().choose(step, q)
        return found[:, :1].expand_as(found).clone()


class LastOfEquals(Blocks):
    """Of equal scores the later block."""

    def scores(self, q: torch.Tensor, slots: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
        scores = super().scores(q, slots, at)
        return scores + 1e-4 * torch.arange(scores.shape[-1])


class KeptBlocks(Blocks):
    """A block's key stays as it was first made, though its tokens were replaced."""

    def complete(self, step: StepBatch, keys: torch.Tensor) -> None:
        made = getattr(self, "made", set())
        ends = [i for i, p in enumerate(step.positions.tolist()) if p % self.spec.block == self.spec.block - 1]
        new = [i for i in ends if int(step.slots()[i]) not in made]
        self.made = made | {int(step.slots()[i]) for i in new}
        self.of_blocks[step.slots()[new]] = keys[new]


class SharedHeads(Cache):
    """All key heads see what was chosen for the first."""

    def attend(self, step: StepBatch, q: torch.Tensor, scale: float, sinks: Any = None, chosen: Any = None) -> Any:
        return super().attend(step, q, scale, sinks, None if chosen is None else chosen[:, 0])


def _rotated_late(request: LoadRequest) -> LoadRequest:
    """Keys of blocks are rotated as their last token."""
    spec: Any = request.spec
    turn = request.children["rope"]

    def late(x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        return turn(x, positions + (spec.cache.block - 1 if x.shape[1] == 1 else 0))

    return replace(request, children=dict(request.children) | {"rope": late})


def _normed_tokens(request: LoadRequest) -> LoadRequest:
    """The norm comes before the mean."""
    parts = dict(request.children)
    k, norm = parts["k"], parts["k_norm"]
    return replace(request, children=parts | {"k": lambda x: norm(k(x)), "k_norm": lambda x: x})


def _cache(kind: type[Blocks]) -> dict[type[Spec], Maker]:
    return {BlockIndexCacheSpec: lambda request: kind(request.spec)}  # type: ignore[arg-type]


BLOCKS = [
    named("block scores without relu", "L3.block_index_cache.mean", _cache(WithoutRelu)),
    named("means as keys of blocks", "L3.block_index_cache.mean", _cache(RawKeys)),
    named("tail of the context left out", "L3.block_index_cache.mean", _cache(WithoutTail)),
    named("later tokens count for a block", "L3.block_index_cache.none-local", _cache(SeenEarly)),
    named("blocks by the mean of scores", "L3.block_index_cache.max", _cache(ByMean)),
    named("one choice of blocks for all heads", "L3.block_index_cache.max", _cache(OneChoice)),
    named("the later of equal blocks", "L3.block_index_cache.ties", _cache(LastOfEquals)),
    named("keys of blocks that were taken back", "L3.block_index_cache.taken-back", _cache(KeptBlocks)),
    named(
        "blocks rotated as their last token",
        "L3.block_indexer.mean",
        {BlockIndexerSpec: lambda r: plain_indexers.block_indexer(_rotated_late(r))},
    ),
    named(
        "norm before the mean of a block",
        "L3.block_indexer.mean",
        {BlockIndexerSpec: lambda r: plain_indexers.block_indexer(_normed_tokens(r))},
    ),
    named("choice of the first key head", "L3.kv_cache.gqa.chosen", {KVCacheSpec: lambda r: SharedHeads(r.spec)}),  # type: ignore[arg-type]
]
