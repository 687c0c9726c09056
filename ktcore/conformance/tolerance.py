"""How wrong a backend may be: a few times what torch itself is in the same precision, against float64."""

from __future__ import annotations

import torch

from ktcore.conformance.case import Context
from ktcore.conformance.expectations import Precision

WORST_FACTOR = 4.0
"""Largest error: at most so many times torch's largest."""
TYPICAL_FACTOR = 2.5
"""Root mean square error: at most so many times torch's."""
LEAST_16_BITS, MOST_16_BITS = 1e-5, 3e-2
"""Errors relative to a result's size that products in float16 or bfloat16 have; above, something is wrong."""
FLOOR_ULPS = 16.0
"""Errors below so many float32 units in the last place of the largest result always pass: order of summation."""


def compare(
    ctx: Context, got: torch.Tensor, truth: torch.Tensor, torch_own: torch.Tensor, what: str = "result"
) -> None:
    """Fail unless `got` is as near to `truth` as the factors above ask, relative to `torch_own`.

    Args:
        got: what the backend gave, on the CPU.
        truth: float64.
        torch_own: the same computation by torch in the backend's declared precision.

    Raises:
        Failure: it is not; or shape, dtype or a value that is not finite.
    """
    ctx.require(got.shape == truth.shape, f"{what} has shape {list(got.shape)}, not {list(truth.shape)}")
    ctx.require(got.dtype == torch.float32, f"{what} is {got.dtype}, not float32")
    if truth.numel() == 0:
        return
    bad = int((~torch.isfinite(got)).sum())
    ctx.require(bad == 0, f"{what} holds {bad} values of {got.numel()} that are not finite")
    floor = FLOOR_ULPS * torch.finfo(torch.float32).eps * float(truth.abs().max())
    error, own = (got.double() - truth).abs(), (torch_own.double() - truth).abs()
    worst = float(error.max()) / (WORST_FACTOR * float(own.max()) + floor)
    typical = _rms(error) / (TYPICAL_FACTOR * _rms(own) + floor / 4)
    ctx.keep_worst("error", max(worst, typical))
    if max(worst, typical) > 1:
        at = [int(i) for i in torch.unravel_index(error.argmax(), error.shape)]
        ctx.fail(
            f"{what} is {max(worst, typical):.3g} times too inexact: largest error {float(error.max()):.3g} at {at} "
            f"(torch's own: {float(own.max()):.3g}), root mean square {_rms(error):.3g} (torch's own: {_rms(own):.3g})"
            + _undeclared(ctx, what.partition(":")[0].partition(",")[0], _rms(error) / max(_rms(truth), 1e-30))
        )


def same_bits(ctx: Context, first: torch.Tensor, second: torch.Tensor, reason: str) -> None:
    """Fail unless both hold the same bits; not-a-number equals itself."""
    equal = (first == second) | (first.isnan() & second.isnan())
    different = int((~equal).sum())
    ctx.require(different == 0, f"{reason}: {different} of {first.numel()} values differ")


def _undeclared(ctx: Context, implementation: str, relative: float) -> str:
    """What to declare, where an error looks like that of 16 bits and the plugin says nothing of them."""
    silent = ctx.target.expectations.precision_of(implementation) == Precision()
    if (
        not silent
        or not implementation.startswith(f"{ctx.target.name}.")
        or not LEAST_16_BITS < relative < MOST_16_BITS
    ):
        return ""
    return (
        "; an error of this size is that of 16 bits: if it computes so, its plugin declares it by the hook "
        f"ktcore_conformance_expectations: Expectations(precision={{'{implementation}': Precision('bfloat16')}})"
    )


def _rms(x: torch.Tensor) -> float:
    return float(x.pow(2).mean().sqrt())
