"""RMSNorm: widths in use, per-head norms, inputs where eps decides."""

from __future__ import annotations

from functools import partial

from ktcore.conformance.case import Case, Check, Context
from ktcore.conformance.levels.operator import check, normal
from ktcore.conformance.truth import small
from ktcore.ops import RMSNormSpec


def cases() -> list[Case]:
    """Shapes by widths; formats of the weight; magnitudes."""
    found = [
        _case(f"dim-{dim}", f"{shape} values over the last axis", partial(_check, dim, shape))
        for dim, shape in ((64, (1, 64)), (576, (7, 576)), (2048, (33, 2048)), (7168, (3, 7168)))
    ]
    heads = [
        _case(f"per-head-{dim}", "over each head, as query and key norms are", partial(_check, dim, (5, 4, dim)))
        for dim in (64, 128, 192)
    ]
    formats = [
        _case(f"{fmt}.weight", "weight stored in this format", partial(_check, 512, (4, 512), fmt=fmt), fmt)
        for fmt in ("F32", "F16", "BF16")
    ]
    return [
        *found,
        *heads,
        *formats,
        _case("small-input", "so small that eps decides", partial(_check, 256, (4, 256), scale=1e-3)),
        _case("large-input", "squares beyond float16", partial(_check, 256, (4, 256), scale=1e4)),
        _case("eps", "a large eps", partial(_check, 256, (4, 256), eps=0.5)),
    ]


def _case(name: str, about: str, run: Check, fmt: str | None = None) -> Case:
    return Case(f"L2.rms_norm.{name}", 2, "rms_norm", about, run, fmt)


def _check(
    dim: int, shape: tuple[int, ...], ctx: Context, fmt: str = "F32", scale: float = 1.0, eps: float = 1e-6
) -> None:
    spec = RMSNormSpec(dim, eps, fmt)
    x = normal(ctx.rng("x"), *shape) * scale
    check(ctx, spec, [x], lambda w, a: small.rms_norm(spec, w, x, a))
