"""Backends that are wrong in attention over a window and entries: in a cache, in what an entry is, in the branch."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from ktcore.backend import LoadRequest
from ktcore.ops import CompressedAttentionSpec, EntryCacheSpec, EntryIndexerSpec, RouterSpec, StepBatch, WindowCacheSpec

from . import plain, plain_compressed
from .mutants import Maker, named
from .plain_compressed import Compressed, Entries, Window


class OneMore(Window):
    """A window that is a token longer."""

    def __init__(self, spec: WindowCacheSpec) -> None:
        super().__init__(replace(spec, window=spec.window + 1))


class Early(Entries):
    """Entries are seen from their window's first token on."""

    def shown(self, step: StepBatch) -> Any:
        return [(span, rows, (count + 1).clamp(max=len(rows))) for span, rows, count in super().shown(step)]


class Late(Entries):
    """Entries are not seen by the token that closes their window."""

    def shown(self, step: StepBatch) -> Any:
        found = super().shown(step)
        starts = [step.context_lens[i] - (span.stop - span.start) for i, (span, _, _) in enumerate(found)]
        return [
            (span, rows, torch.arange(before, before + len(count)) // self.spec.ratio)
            for before, (span, rows, count) in zip(starts, found, strict=True)
        ]


class AtTheEnd(Entries):
    """Entries are rotated as their window's last token."""

    def position(self, window: int) -> int:
        return window * self.spec.ratio + self.spec.ratio - 1


class InTheirOwn(Entries):
    """First halves count for their own window."""

    def pool(self, step: StepBatch, values: torch.Tensor, gates: torch.Tensor) -> Any:
        if self.spec.overlap:
            values, gates = (torch.cat(t.chunk(2, -1)[::-1], -1) for t in (values, gates))
        return super().pool(step, values, gates)


class Forgetful(Entries):
    """Open windows begin anew with every step of a sequence."""

    def with_new(self, step: StepBatch, i: int, new: torch.Tensor, before: int, first: int) -> torch.Tensor:
        self.held[step.state_slots[i]] = 0
        return super().with_new(step, i, new, before, first)


class WithoutCopies(Entries):
    """Open windows stay behind when states are copied."""

    def copy_states(self, source: Any, target: Any) -> None:
        pass


class NotBack(Compressed):
    """What was attended to stays rotated."""

    def back(self, x: torch.Tensor, step: StepBatch) -> torch.Tensor:
        return x


class OfAnySize(Compressed):
    """Queries are not divided by their size."""

    def normed(self, q: torch.Tensor) -> torch.Tensor:
        return q


class WithoutSinks(Compressed):
    """Sinks take no share."""

    def __init__(self, request: LoadRequest) -> None:
        super().__init__(request)
        self.sinks = self.sinks - 100


class WithoutPlace(Compressed):
    """Gates do not depend on the place in the window."""

    def __init__(self, request: LoadRequest) -> None:
        super().__init__(request)
        self.ape = None if self.ape is None else torch.zeros_like(self.ape)


def without_sign(request: LoadRequest) -> Any:
    """Index heads' weights count by their size."""
    right = request.children["weights"]
    children = {**request.children, "weights": lambda n: right(n).abs()}
    return plain_compressed.entry_indexer(replace(request, children=children))


def by_position(request: LoadRequest) -> Any:
    """A table of experts is read by position."""
    if not request.spec.by_token:  # type: ignore[attr-defined]
        return plain.router(request)
    run = plain.router(request)
    return lambda x, step: run(x, replace(step, token_ids=step.positions))


def unrooted(request: LoadRequest) -> Any:
    """Softplus without its root: each weight as large as its square was."""
    spec: RouterSpec = request.spec  # type: ignore[assignment]
    run = plain.router(request)
    if not spec.root_softplus:
        return run

    def square(x: torch.Tensor, *step: StepBatch) -> Any:
        ids, weights = run(x, *step)
        weights = weights * weights
        return ids, weights / weights.sum(-1, keepdim=True) * spec.scale

    return square


def _cache(kind: type[Entries]) -> Maker:
    return lambda request: kind(request.spec)  # type: ignore[arg-type]


COMPRESSED = [
    named("window longer", "L3.window_cache.ragged", {WindowCacheSpec: lambda r: OneMore(r.spec)}),  # type: ignore[arg-type]
    named("entries early", "L3.entry_cache.plain", {EntryCacheSpec: _cache(Early)}),
    named("entries late", "L3.entry_cache.plain", {EntryCacheSpec: _cache(Late)}),
    named("entries rotated late", "L3.compressed_attention.all-entries", {EntryCacheSpec: _cache(AtTheEnd)}),
    named("entries own window", "L3.entry_cache.overlap", {EntryCacheSpec: _cache(InTheirOwn)}),
    named("entries forgetful", "L3.entry_cache.plain", {EntryCacheSpec: _cache(Forgetful)}),
    named("entries not copied", "L3.compressed_attention.copied.all-entries", {EntryCacheSpec: _cache(WithoutCopies)}),
    named("not rotated back", "L3.compressed_attention.window", {CompressedAttentionSpec: NotBack}),
    named("queries of any size", "L3.compressed_attention.window", {CompressedAttentionSpec: OfAnySize}),
    named("no sinks", "L3.compressed_attention.window", {CompressedAttentionSpec: WithoutSinks}),
    named("no place in window", "L3.compressed_attention.all-entries", {CompressedAttentionSpec: WithoutPlace}),
    named("index weights without sign", "L3.entry_indexer.ragged", {EntryIndexerSpec: without_sign}),
    named("experts by position", "L3.router.by-token", {RouterSpec: by_position}),
    named("scores without root", "L3.router.by-token", {RouterSpec: unrooted}),
]
