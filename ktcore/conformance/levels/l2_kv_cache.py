"""Paged KV caches by themselves: both kinds, real head counts, contexts that end on, before and after page edges."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import torch

from ktcore.conformance.case import Case, Check, Context
from ktcore.conformance.data.batches import Plan, batches, scattered
from ktcore.conformance.levels.operator import normal
from ktcore.conformance.target import Loaded
from ktcore.conformance.tolerance import compare
from ktcore.conformance.truth.arithmetic import EXACT, Arithmetic
from ktcore.conformance.truth.attention import causal
from ktcore.ops import KVCacheSpec

GQA = ((16, 16, 64), (32, 8, 128), (64, 4, 128), (128, 8, 64), (9, 3, 64), (16, 2, 192))
MLA = ((16, 512, 64), (128, 512, 64), (4, 64, 32))
RAGGED = ((5, 17, 1, 0), (1, 1, 1, 33), (3, 1, 40, 1), (1, 1, 1, 1))


def cases() -> list[Case]:
    """Shapes, then what happens to pages."""
    found = []
    for heads, groups, dim in GQA:
        spec = KVCacheSpec("gqa", heads, groups, dim, dim)
        name = f"gqa.{heads}-heads-{groups}-groups-dim-{dim}"
        found.append(_case(name, "a ragged batch over scattered pages", partial(_check, spec, RAGGED)))
    for heads, latent, rot in MLA:
        spec = KVCacheSpec("mla", heads, 1, latent + rot, latent)
        name = f"mla.{heads}-heads-latent-{latent}-{rot}"
        found.append(_case(name, "a ragged batch over scattered pages", partial(_check, spec, RAGGED)))
    for spec in (KVCacheSpec("gqa", 8, 2, 64, 64), KVCacheSpec("mla", 8, 1, 96, 64)):
        found += [
            _case(f"{spec.kind}.page-edges", "contexts one below, at and above whole pages", partial(_edges, spec)),
            _case(f"{spec.kind}.every-page-size", "all page sizes that are offered", partial(_page_sizes, spec)),
            _case(f"{spec.kind}.reused-pages", "a new sequence on pages of one that ended", partial(_reused, spec)),
            _case(f"{spec.kind}.long-context", "1100 tokens, in chunks", partial(_check, spec, ((500,), (599,), (1,)))),
            _case(f"{spec.kind}.one-token", "a first and only token", partial(_check, spec, ((1,),))),
            _case(f"{spec.kind}.scale", "the scale is the one that is given", partial(_check, spec, RAGGED, scale=0.4)),
        ]
    return found


def _case(name: str, about: str, run: Check) -> Case:
    return Case(f"L2.kv_cache.{name}", 2, "kv_cache", about, run)


def _check(spec: KVCacheSpec, steps: Sequence[Sequence[int]], ctx: Context, scale: float | None = None) -> None:
    for loaded in ctx.target.load(ctx, spec, {}):
        run_cache(ctx, loaded, spec, steps, loaded.page_sizes[0], scale)


def _edges(spec: KVCacheSpec, ctx: Context) -> None:
    for loaded in ctx.target.load(ctx, spec, {}):
        p = loaded.page_sizes[0]
        run_cache(ctx, loaded, spec, ((p - 1, p, p + 1, 2 * p), (1, 1, 1, 1), (1, p, p - 2, 1), (1, 1, 1, 1)), p)


def _page_sizes(spec: KVCacheSpec, ctx: Context) -> None:
    for loaded in ctx.target.load(ctx, spec, {}):
        for p in loaded.page_sizes:
            run_cache(ctx, loaded, spec, ((p + 3, 2), (1, 1), (2, p), (1, 1)), p)


def _reused(spec: KVCacheSpec, ctx: Context) -> None:
    """The first sequence fills the pages; the second is shorter and must not see what is left of it."""
    for loaded in ctx.target.load(ctx, spec, {}):
        p = loaded.page_sizes[0]
        first = scattered(((2 * p,), (1,)), p, ctx.rng("pages"))
        second = Plan(((p + 2,), (1,), (1,)), p, first.pages, (first.tables[0][:2],))
        loaded.allocate(first.pages, p)
        run_plan(ctx, loaded, spec, first, None, "first")
        run_plan(ctx, loaded, spec, second, None, "second")


def run_cache(
    ctx: Context,
    loaded: Loaded,
    spec: KVCacheSpec,
    steps: Sequence[Sequence[int]],
    page_size: int,
    scale: float | None = None,
) -> None:
    """Append and attend step by step, and compare all outputs."""
    plan = scattered(steps, page_size, ctx.rng(f"pages {page_size}"))
    loaded.allocate(plan.pages, page_size)
    run_plan(ctx, loaded, spec, plan, scale, f"page size {page_size}")


def run_plan(ctx: Context, loaded: Loaded, spec: KVCacheSpec, plan: Plan, scale: float | None, what: str) -> None:
    """Append and attend along the plan on pages that are there, and compare all outputs."""
    rng, lengths = ctx.rng(f"values {what}"), plan.lengths()
    widths = (spec.value_dim, spec.key_dim - spec.value_dim) if spec.kind == "mla" else (spec.key_dim, spec.value_dim)
    heads = () if spec.kind == "mla" else (spec.kv_heads,)
    first = [normal(rng, n, *heads, widths[0]) for n in lengths]
    second = [normal(rng, n, *heads, widths[1]) for n in lengths]
    queries = [normal(rng, n, spec.heads, spec.key_dim) for n in lengths]
    # scores with a spread of 1.5: far from uniform, and no single key takes all
    factor = scale or 1.5 * spec.key_dim**-0.5
    sinks = normal(rng, spec.heads) if spec.sinks else None
    more = () if sinks is None else (sinks,)
    choices = [_choices(rng, n, spec) for n in lengths] if spec.chosen else None
    got: list[list[torch.Tensor]] = [[] for _ in lengths]
    cache = _Calls(ctx, loaded.module)
    for step, rows in batches(plan):
        cache.append(step, *(torch.cat([t[i][span] for i, span in rows]) for t in (first, second)))
        picked = None if choices is None else torch.cat([choices[i][span] for i, span in rows])
        out = cache.attend(step, torch.cat([queries[i][span] for i, span in rows]), factor, *more, chosen=picked)
        for at, (i, span) in zip(step.q_start, rows, strict=False):
            got[i].append(out[at : at + span.stop - span.start])
    truth: list[torch.Tensor] = []
    own: list[torch.Tensor] = []
    for a, results in ((EXACT, truth), (Arithmetic.of(loaded.precision), own)):
        for i, (q, k, v) in enumerate(zip(queries, first, second, strict=True)):
            k, v = a.stored(k), a.stored(v)
            if spec.kind == "mla":
                k, v = torch.cat((k, v), -1)[:, None], k[:, None]
            seen = None if choices is None else among(choices[i], lengths[i])
            results.append(causal(a.cast(q), k, v, factor, spec.window, spec.chunk, sinks, seen))
    together = [torch.cat([torch.cat(parts) for parts in got]), torch.cat(truth), torch.cat(own)]
    compare(ctx, together[0], together[1], together[2], f"{loaded.id}, {what}: attention")


CHOSEN = 12


def drawn_choices(rng: np.random.Generator, length: int) -> torch.Tensor:
    """For each of `length` tokens up to `CHOSEN` of those up to it, rising, then -1: int32 [length, CHOSEN]."""
    made = torch.full((length, CHOSEN), -1, dtype=torch.int32)
    for t in range(length):
        picked = np.sort(rng.permutation(t + 1)[:CHOSEN])
        made[t, : len(picked)] = torch.from_numpy(picked.astype(np.int32))
    return made


def _choices(rng: np.random.Generator, length: int, spec: KVCacheSpec) -> torch.Tensor:
    """One choice for all heads, or one for those of each key head."""
    if spec.kind == "mla":
        return drawn_choices(rng, length)
    return torch.stack([drawn_choices(rng, length) for _ in range(spec.kv_heads)], 1)


def among(chosen: torch.Tensor, length: int) -> torch.Tensor:
    """bool [..., length]: which tokens each row of `chosen` [..., n] names."""
    return (chosen[..., None] == torch.arange(length)).any(-2)


class _Calls:
    """A cache's two methods with tensors of the CPU."""

    def __init__(self, ctx: Context, cache: Any) -> None:
        self._target = ctx.target
        self._cache = cache

    def append(self, *arguments: Any) -> None:
        self._target.call(self._cache.append, *arguments)

    def attend(self, *arguments: Any, chosen: torch.Tensor | None = None) -> torch.Tensor:
        target = self._target
        more = {} if chosen is None else {"chosen": target.put(chosen)}
        result: torch.Tensor = target.call(partial(self._cache.attend, **more), *arguments)
        return result
