"""Backends that are wrong in sparse attention: in a score, in the choice by scores, or in who is given the choice."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from ktcore.backend import LoadRequest
from ktcore.ops import IndexCacheSpec, KVCacheSpec, MLASpec, Spec, StepBatch, TokenIndexerSpec

from . import plain, plain_indexers
from .mutants import Maker, named
from .plain import Cache
from .plain_indexers import Index


class WithoutRelu(Index):
    """Heads that point away count against a key."""

    def scores(self, q: torch.Tensor, weights: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
        return torch.einsum("th,thd,ld->tl", weights, q, keys)


class ReluLast(Index):
    """The sum of heads is cut off at 0, not each head."""

    def scores(self, q: torch.Tensor, weights: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
        return torch.einsum("th,thd,ld->tl", weights, q, keys).relu()


class WeightsWithoutSign(Index):
    """Weights count by their size."""

    def scores(self, q: torch.Tensor, weights: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
        return super().scores(q, weights.abs(), keys)


class LaterKeys(Index):
    """Every token chooses among all that are cached, later ones too."""

    def choose(self, step: StepBatch, q: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        last = torch.cat([torch.full((b - a,), n - 1) for a, b, n in _spans(step)])
        return super().choose(replace(step, positions=last), q, weights)


class OneChoice(Index):
    """All tokens of a sequence get its last token's choice, as far as they may."""

    def choose(self, step: StepBatch, q: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        found = super().choose(step, q, weights)
        for a, b, _ in _spans(step):
            found[a:b] = found[b - 1 : b]
        return found


class ByScore(Index):
    """The best first, not the earliest."""

    def choose(self, step: StepBatch, q: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        return super().choose(step, q, weights).flip(1)


class LastOfEquals(Index):
    """Of equal scores the later token."""

    def scores(self, q: torch.Tensor, weights: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
        return super().scores(q, weights, keys) + 1e-4 * torch.arange(len(keys))


class FirstChoice(Cache):
    """All tokens of a step attend to what its first one may see."""

    def attend(self, step: StepBatch, q: torch.Tensor, scale: float, sinks: Any = None, chosen: Any = None) -> Any:
        if chosen is not None:
            chosen = chosen[:1].expand_as(chosen)
        return super().attend(step, q, scale, sinks, chosen)


def _spans(step: StepBatch) -> list[tuple[int, int, int]]:
    return list(zip(step.q_start, step.q_start[1:], step.context_lens, strict=False))


def _index(kind: type[Index]) -> dict[type[Spec], Maker]:
    return {IndexCacheSpec: lambda request: kind(request.spec)}  # type: ignore[arg-type]


def _old_choice(request: LoadRequest) -> Any:
    """Attends to the choice before its own indexer has made a new one."""
    run = plain.mla(request)

    def late(x: torch.Tensor, step: StepBatch) -> Any:
        first = torch.arange(12, dtype=torch.int32).expand(len(x), 12)
        keep = step.hand_on
        keep(first)
        object.__setattr__(step, "hand_on", lambda chosen: None)
        return run(x, step)

    return late


def _unturned(request: LoadRequest) -> LoadRequest:
    return replace(request, children=dict(request.children) | {"rope": lambda x, positions: x})


SPARSE = [
    named("index scores without relu", "L3.index_cache.ragged", _index(WithoutRelu)),
    named("relu of the sum of heads", "L3.index_cache.ragged", _index(ReluLast)),
    named("index weights without their sign", "L3.index_cache.ragged", _index(WeightsWithoutSign)),
    named("later tokens are chosen", "L3.index_cache.ragged", _index(LaterKeys)),
    named("one choice for a sequence's tokens", "L3.index_cache.real-width", _index(OneChoice)),
    named("chosen tokens by their scores", "L3.index_cache.all", _index(ByScore)),
    named("the later of equal tokens", "L3.index_cache.ties", _index(LastOfEquals)),
    named(
        "rotation of index heads left out",
        "L3.token_indexer.ragged",
        {TokenIndexerSpec: lambda r: plain_indexers.indexer(_unturned(r))},
    ),
    named("choice of the step's first token", "L3.kv_cache.mla.chosen", {KVCacheSpec: lambda r: FirstChoice(r.spec)}),  # type: ignore[arg-type]
    named("choice of the layer before", "L3.mla.indexer", {MLASpec: _old_choice}),
]
