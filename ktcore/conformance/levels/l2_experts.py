"""Routed experts: formats, 128 to 384 experts, and the routings that break kernels."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
import torch

from ktcore.conformance.case import Case, Check, Context
from ktcore.conformance.data.blocks import FORMATS
from ktcore.conformance.data.memory import make_weights
from ktcore.conformance.levels.operator import any_format, check, normal
from ktcore.conformance.levels.specs import experts
from ktcore.conformance.truth import moe as truth
from ktcore.ops import ExpertsSpec

Routing = Callable[[np.random.Generator, int, int, int], np.ndarray]
"""rng, tokens, experts, top_k -> ids [tokens, top_k]."""


def cases() -> list[Case]:
    """Formats, counts, routings."""
    found = [
        _case(f"{fmt}.8-experts", "every expert is hit", partial(_check, 8, 2, 256, 256, fmt, 9, _spread), fmt)
        for fmt in FORMATS
    ]
    found += [
        _case(f"{n}-experts", "many experts, most of them empty", partial(_check, n, 8, 64, 32, "F32", 11, _spread))
        for n in (128, 256, 384)
    ]
    routings: dict[str, tuple[str, int, Routing]] = {
        "one-token": ("a single token", 1, _spread),
        "skewed": ("every token to the same experts", 37, _skewed),
        "first-only": ("only the first expert is hit", 5, partial(_fixed, 0)),
        "last-only": ("only the last expert is hit", 5, partial(_fixed, -1)),
        "repeated": ("the same expert twice for one token counts twice", 7, _repeated),
        "masked": ("negative ids are computed elsewhere and add nothing", 13, _masked),
        "all-masked": ("a token without any expert here gets zeros", 6, _all_masked),
        "130-tokens": ("more tokens than a tile for each expert", 130, _spread),
    }
    found += [
        _case(name, about, partial(_check, 16, 4, 256, 256, None, tokens, routing))
        for name, (about, tokens, routing) in routings.items()
    ]
    return [
        *found,
        _case("mixed-formats", "down in another format than gate and up", _mixed),
        _case("weights", "weights of zero, below zero and far above one", _weights),
        _case("not-a-number", "a NaN stays with its token", _nan),
    ]


def _case(name: str, about: str, run: Check, fmt: str | None = None) -> Case:
    return Case(f"L2.experts.{name}", 2, "experts", about, run, fmt)


def _check(
    count: int, top_k: int, hidden: int, wide: int, fmt: str | None, tokens: int, routing: Routing, ctx: Context
) -> None:
    fmt = fmt or any_format(ctx, lambda f: experts(count, top_k, hidden, wide, f))
    rng = ctx.rng("routing")
    ids = torch.from_numpy(routing(rng, tokens, count, top_k).astype(np.int64))
    amounts = torch.from_numpy(rng.uniform(0.1, 1.0, ids.shape).astype(np.float32))
    _compare(ctx, experts(count, top_k, hidden, wide, fmt), ids, amounts)


def _compare(ctx: Context, spec: ExpertsSpec, ids: torch.Tensor, amounts: torch.Tensor) -> None:
    x = normal(ctx.rng("x"), ids.shape[0], spec.hidden)
    check(ctx, spec, [x, ids, amounts], lambda w, a: truth.experts(spec, w, x, ids, amounts, a))


def check_spread(ctx: Context, spec: ExpertsSpec, tokens: int) -> None:
    """Compare over an even routing."""
    ids = torch.from_numpy(_spread(ctx.rng("routing"), tokens, spec.experts, spec.top_k).astype(np.int64))
    amounts = torch.from_numpy(ctx.rng("amounts").uniform(0.1, 1.0, ids.shape).astype(np.float32))
    _compare(ctx, spec, ids, amounts)


def _mixed(ctx: Context) -> None:
    spec = experts(4, 2, 256, 256, "Q4_K", "Q6_K")
    ids = torch.from_numpy(_spread(ctx.rng("routing"), 6, 4, 2).astype(np.int64))
    _compare(ctx, spec, ids, torch.full(ids.shape, 0.5))


def _weights(ctx: Context) -> None:
    fmt = any_format(ctx, lambda f: experts(8, 4, 256, 256, f))
    ids = torch.from_numpy(_spread(ctx.rng("routing"), 5, 8, 4).astype(np.int64))
    _compare(ctx, experts(8, 4, 256, 256, fmt), ids, torch.tensor([[0.0, 2.5, -0.5, 16.0]]).expand(5, 4).contiguous())


def _nan(ctx: Context) -> None:
    fmt = any_format(ctx, lambda f: experts(8, 2, 256, 256, f))
    spec = experts(8, 2, 256, 256, fmt)
    x = normal(ctx.rng("x"), 4, 256)
    x[1, 100] = float("nan")
    ids = torch.from_numpy(_skewed(ctx.rng("routing"), 4, 8, 2).astype(np.int64))
    for loaded in ctx.target.load(ctx, spec, make_weights(spec, ctx.rng("weights"))):
        got = ctx.target.call(loaded.module, x, ids, torch.full(ids.shape, 0.5))
        ctx.require(bool(torch.isfinite(got[[0, 2, 3]]).all()), f"{loaded.id}: a NaN in one token spoils others")
        ctx.require(bool(got[1].isnan().any()), f"{loaded.id}: a NaN in the input vanished: the result is finite")


def _spread(rng: np.random.Generator, tokens: int, count: int, top_k: int) -> np.ndarray:
    return np.stack([rng.permutation(count)[:top_k] for _ in range(tokens)])


def _skewed(rng: np.random.Generator, tokens: int, count: int, top_k: int) -> np.ndarray:
    return np.repeat(rng.permutation(count)[None, :top_k], tokens, 0)


def _fixed(which: int, rng: np.random.Generator, tokens: int, count: int, top_k: int) -> np.ndarray:
    ids = np.full((tokens, top_k), -1)
    ids[:, rng.integers(top_k)] = which % count
    return ids


def _repeated(rng: np.random.Generator, tokens: int, count: int, top_k: int) -> np.ndarray:
    ids = _spread(rng, tokens, count, top_k)
    ids[::2, 1] = ids[::2, 0]
    return ids


def _masked(rng: np.random.Generator, tokens: int, count: int, top_k: int) -> np.ndarray:
    ids = _spread(rng, tokens, count, top_k)
    ids[rng.random(ids.shape) < 0.5] = -1
    ids[0] = -7
    return ids


def _all_masked(rng: np.random.Generator, tokens: int, count: int, top_k: int) -> np.ndarray:
    ids = _spread(rng, tokens, count, top_k)
    ids[1:] = -1
    return ids
