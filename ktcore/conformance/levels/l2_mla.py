"""Latent attention branches: 16 to 128 heads over latents of 512 + 64, both stored forms, YaRN's softmax scale."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

from ktcore.conformance.case import Case, Check, Context
from ktcore.conformance.data.blocks import FORMATS
from ktcore.conformance.levels.operator import any_format, check_sequences
from ktcore.conformance.levels.specs import mla
from ktcore.conformance.truth import attention as truth
from ktcore.ops import MLASpec

RAGGED = ((5, 9, 1, 0), (1, 1, 1, 12), (1, 3, 1, 1), (1, 1, 1, 1))
SHORT = ((3, 6), (1, 1))


def cases() -> list[Case]:
    """Formats on a small shape, real shapes, stored forms."""
    tiny = {"heads": 4, "latent": 256}
    found = [
        _case(
            f"{fmt}.ragged",
            "a ragged batch, small heads",
            partial(_check, {"heads": 8, "latent": 256, "fmt": fmt}, SHORT),
            fmt,
        )
        for fmt in FORMATS
    ]
    found += [
        _case(f"{h}-heads", "latents of 512 + 64", partial(_check, {"heads": h}, SHORT)) for h in (16, 32, 64, 128)
    ]
    return [
        *found,
        _case("ragged", "four sequences of different age", partial(_check, tiny, RAGGED)),
        _case("whole-query", "no low-rank query", partial(_check, dict(tiny, low_rank=0), RAGGED)),
        _case("fused-up", "one up-projection for keys and values", partial(_check, dict(tiny, split=False), SHORT)),
        _case(
            "split-up", "two up-projections, keys transposed", partial(_check, dict(tiny, split=True, fmt="F32"), SHORT)
        ),
        _case("half-pairing", "rotary halves", partial(_check, dict(tiny, pairing="half"), SHORT)),
        _case("no-yarn", "without YaRN", partial(_check, dict(tiny, yarn=False), RAGGED)),
        _case(
            "yarn-scale",
            "the softmax scale holds YaRN's factor squared",
            partial(_check, dict(tiny), RAGGED, spread=2.0),
        ),
        _case(
            "page-edges",
            "contexts beyond a page",
            partial(_check, tiny, ((63, 64, 65), (1, 1, 1), (2, 1, 64), (1, 1, 1))),
        ),
        _case("one-token", "a first and only token", partial(_check, tiny, ((1,),))),
    ]


def _case(name: str, about: str, run: Check, fmt: str | None = None) -> Case:
    return Case(f"L2.mla.{name}", 2, "mla", about, run, fmt)


def _check(shape: Mapping[str, object], steps: Sequence[Sequence[int]], ctx: Context, spread: float = 1.0) -> None:
    def make(fmt: str) -> MLASpec:
        return mla(**{"fmt": fmt, **shape})  # type: ignore[arg-type]

    spec = make(str(shape.get("fmt") or any_format(ctx, make)))
    check_sequences(ctx, spec, steps, lambda w, x, a: truth.mla(spec, w, x, a), spec.hidden, spread=spread)
