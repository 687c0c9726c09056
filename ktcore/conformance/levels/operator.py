"""What the operator cases share: draw inputs, load, call, and hold the result against the truth."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from ktcore.backend.handles import answer
from ktcore.backend.implementation import Unsupported
from ktcore.conformance.case import Context
from ktcore.conformance.data.batches import Plan, batches, scattered
from ktcore.conformance.data.memory import make_weights, storable, values
from ktcore.conformance.target import Loaded
from ktcore.conformance.tolerance import compare
from ktcore.conformance.truth.arithmetic import EXACT, Arithmetic
from ktcore.ops import Spec

Truth = Callable[[dict[str, torch.Tensor], Arithmetic], torch.Tensor]
"""From dequantised weights, in an arithmetic."""
SIMPLE_FORMATS = ("Q4_K", "Q8_0", "Q4_0", "BF16", "F16", "F32")
"""Tried in this order by cases that need any format."""
ORDERED = ("INT4_G32_ORDERED", "INT4_G64_ORDERED", "INT4_G128_ORDERED", "INT8_G32_ORDERED")
"""Formats whose columns are stored in another order than the input's, as GPTQ's activation order leaves them."""


def normal(rng: np.random.Generator, *shape: int) -> torch.Tensor:
    """Standard normal float32, in bfloat16 steps: exact in every precision that a backend may take inputs in."""
    drawn = torch.from_numpy(rng.standard_normal(shape, dtype=np.float32))
    return drawn.to(torch.bfloat16).float()


def check(ctx: Context, spec: Spec, arguments: Sequence[Any], truth: Truth) -> None:
    """Load `spec` with every implementation that takes it, call each, and compare with the truth."""
    weights = make_weights(spec, ctx.rng("weights"))
    known = values(weights)
    exact = truth(known, EXACT)
    for loaded in ctx.target.load(ctx, spec, weights):
        got = ctx.target.call(loaded.module, *arguments)
        compare(ctx, got, exact, truth(known, Arithmetic.of(loaded.precision)), f"{loaded.id}: result")


def check_sequences(
    ctx: Context,
    spec: Spec,
    steps: Sequence[Sequence[int]],
    whole: Callable[[dict[str, torch.Tensor], torch.Tensor, Arithmetic], torch.Tensor],
    hidden: int,
    page_size: int | None = None,
    spread: float = 1.0,
) -> None:
    """Run a branch with a KV cache step by step over scattered pages; `whole` is the truth of a sequence at once."""
    weights = make_weights(spec, ctx.rng("weights"))
    known = values(weights)
    rng = ctx.rng("inputs")
    totals = [sum(step[i] for step in steps) for i in range(len(steps[0]))]
    inputs = [spread * normal(rng, n, hidden) for n in totals]
    exact = [whole(known, x, EXACT) for x in inputs]
    for loaded in ctx.target.load(ctx, spec, weights):
        own_arithmetic = Arithmetic.of(loaded.precision)
        own = [whole(known, x, own_arithmetic) for x in inputs]
        plan = scattered(steps, page_size or first_page_size(ctx, loaded), ctx.rng("pages"))
        got = run_sequences(ctx, loaded, plan, inputs)
        # all sequences together: one that is a few tokens long has too few errors for a mean
        compare(ctx, torch.cat(got), torch.cat(exact), torch.cat(own), f"{loaded.id}: result")


def run_sequences(
    ctx: Context,
    loaded: Loaded,
    plan: Plan,
    inputs: Sequence[torch.Tensor],
    skip: int = 0,
    before: Callable[[], None] | None = None,
) -> list[torch.Tensor]:
    """Outputs of every sequence, put back together from the steps but the first `skip`, which are not run.

    Args:
        before: called when pages are allocated and nothing has run.
    """
    loaded.allocate(plan.pages, plan.page_size)
    if before is not None:
        before()
    found: list[list[torch.Tensor]] = [[] for _ in inputs]
    for step, rows in batches(plan)[skip:]:
        x = torch.cat([inputs[i][span] for i, span in rows])
        got = ctx.target.call(loaded.module, x, step)
        for at, (i, span) in zip(step.q_start, rows, strict=False):
            found[i].append(got[at : at + span.stop - span.start])
    return [torch.cat(parts) for parts in found]


def first_page_size(ctx: Context, loaded: Loaded) -> int:
    """The page size that the caches inside prefer."""
    ctx.require(bool(loaded.page_sizes), f"{loaded.id} holds a KV cache but offers no page size")
    return loaded.page_sizes[0]


def any_format(ctx: Context, make: Callable[[str], Spec], formats: Sequence[str] = SIMPLE_FORMATS) -> str:
    """A format that the backend takes in what `make` gives, quantised ones first."""
    own = [i for i in ctx.target.implementations if i.spec_type is type(make("F32"))]
    for fmt in formats:
        if storable(make(fmt)) and any(
            not isinstance(answer(i, make(fmt), ctx.target.device), Unsupported) for i in own
        ):
            return fmt
    return next(fmt for fmt in (formats if formats != SIMPLE_FORMATS else ("Q8_0", "F32")) if storable(make(fmt)))
