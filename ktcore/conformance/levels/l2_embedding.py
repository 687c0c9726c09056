"""Token embedding: every weight format, repeated and extreme ids."""

from __future__ import annotations

from functools import partial

import torch

from ktcore.conformance.case import Case, Check, Context
from ktcore.conformance.data.blocks import FORMATS
from ktcore.conformance.data.memory import make_weights
from ktcore.conformance.levels.operator import any_format, check
from ktcore.ops import EmbeddingSpec

VOCAB = 300


def cases() -> list[Case]:
    """One case a format, and the ids that go wrong."""
    found = [
        _case(
            f"{fmt}.rows", "first, last, repeated and other ids", partial(_rows, fmt, (0, VOCAB - 1, 7, 7, 7, 131)), fmt
        )
        for fmt in FORMATS
    ]
    return [
        *found,
        _case("one-token", "a single id", partial(_rows, None, (VOCAB - 1,))),
        _case("many-tokens", "more ids than rows", partial(_rows, None, tuple(i * 7 % VOCAB for i in range(701)))),
        _case("outside", "an id outside of the vocabulary is an error", _outside),
    ]


def _case(name: str, about: str, run: Check, fmt: str | None = None) -> Case:
    return Case(f"L2.embedding.{name}", 2, "embedding", about, run, fmt)


def _rows(fmt: str | None, ids: tuple[int, ...], ctx: Context) -> None:
    spec = EmbeddingSpec(VOCAB, 256, fmt or any_format(ctx, lambda f: EmbeddingSpec(VOCAB, 256, f)))
    wanted = torch.tensor(ids)
    check(ctx, spec, [wanted], lambda w, a: a.cast(w["weight"])[wanted])


def _outside(ctx: Context) -> None:
    if not ctx.target.is_host:
        ctx.not_applicable("an accelerator may stop for good at an id that is out of range; the engine checks ids")
    spec = EmbeddingSpec(VOCAB, 256, any_format(ctx, lambda f: EmbeddingSpec(VOCAB, 256, f)))
    for loaded in ctx.target.load(ctx, spec, make_weights(spec, ctx.rng("weights"))):
        try:
            ctx.target.call(loaded.module, torch.tensor([3, VOCAB]))
        except Exception:
            continue
        ctx.fail(f"{loaded.id}: id {VOCAB} of a vocabulary of {VOCAB} gave a row")
