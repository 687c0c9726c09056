"""Rotary embedding: both pairings, partial width, every scaling, positions far out."""

from __future__ import annotations

from functools import partial

import torch

from ktcore.conformance.case import Case, Check, Context
from ktcore.conformance.levels.operator import check, normal
from ktcore.conformance.levels.specs import LINEAR, LLAMA3, YARN
from ktcore.conformance.truth import small
from ktcore.ops import RopeScaling, RopeSpec

PAIRINGS = ("half", "interleaved")
NEAR = (0, 1, 2, 3, 77, 4095)
FAR = (32767, 32768, 65535, 65536, 131071)


def cases() -> list[Case]:
    """Each pairing by width and scaling."""
    found = []
    for pairing in PAIRINGS:
        for dim, width in ((64, 64), (128, 128), (192, 192), (64, 192)):
            name = f"{pairing}.{dim}-of-{width}"
            found.append(
                _case(name, f"the first {dim} of {width} values turn", partial(_check, pairing, dim, width, None, NEAR))
            )
        for label, scaling in (("linear", LINEAR), ("llama3", LLAMA3), ("yarn", YARN)):
            found.append(
                _case(
                    f"{pairing}.{label}",
                    f"frequencies scaled as {label}",
                    partial(_check, pairing, 64, 64, scaling, NEAR),
                )
            )
        far = partial(_check, pairing, 128, 128, None, FAR)
        found.append(_case(f"{pairing}.long-context", "positions beyond 16 bits", far))
    magnitude = RopeScaling("yarn", 40.0, 4096)
    found.append(
        _case("yarn-magnitude", "YaRN's factor on cos and sin", partial(_check, "half", 64, 64, magnitude, NEAR))
    )
    found.append(_case("one-head", "a single head, as the shared key of latent attention", partial(_one_head)))
    return found


def _case(name: str, about: str, run: Check) -> Case:
    return Case(f"L2.rope.{name}", 2, "rope", about, run)


def _check(
    pairing: str, dim: int, width: int, scaling: RopeScaling | None, at: tuple[int, ...], ctx: Context, heads: int = 3
) -> None:
    spec = RopeSpec(dim, 1e4, pairing, scaling)  # type: ignore[arg-type]
    x, positions = normal(ctx.rng("x"), len(at), heads, width), torch.tensor(at)
    check(ctx, spec, [x, positions], lambda w, a: small.rope(spec, w, x, positions, a))


def _one_head(ctx: Context) -> None:
    _check("interleaved", 64, 64, YARN, NEAR, ctx, heads=1)
