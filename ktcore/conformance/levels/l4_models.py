"""Whole tiny models through the engine: token for token what transformers computes from them in float64."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial, reduce

import torch

from ktcore.conformance.case import Case, Check, Context
from ktcore.conformance.expectations import Precision
from ktcore.conformance.levels.l0_packaging import installed_entry_point
from ktcore.conformance.levels.tiny_models import FAMILIES, TinyModel, own_logits, tiny_model
from ktcore.conformance.tolerance import TYPICAL_FACTOR
from ktcore.engine.model import Model, load
from ktcore.engine.schedule.sequence import Sequence
from ktcore.ops.sampling import SamplingParams

NEW_TOKENS = 12
CONTEXT = 512
LOGITS_OFF = 0.02
"""Root mean square error of a token's logits, of their standard deviation. `TYPICAL_FACTOR` times torch's own
where that is more, in the lowest precision that an implementation of the plan declares."""
SHARE = 0.9


def cases() -> list[Case]:
    """Each family in every way that an engine runs it."""
    checks: dict[str, tuple[str, Check]] = {}
    for family in FAMILIES:
        checks |= {
            f"{family}.one-sequence": ("greedy tokens of one prompt", partial(_one, family)),
            f"{family}.eight-sequences": ("eight prompts of different length at once", partial(_eight, family)),
            f"{family}.logits": ("logits of a whole prompt", partial(_logits, family)),
            f"{family}.again": ("the same prompt twice, with another in between", partial(_again, family)),
            f"{family}.placement": (
                "attention runs on the device",
                partial(_plan, family),
            ),
        }
    return [Case(f"L4.{name}", 4, "model", about, check) for name, (about, check) in checks.items()]


@contextmanager
def loaded(ctx: Context, family: str) -> Iterator[tuple[TinyModel, Model]]:
    """The tiny model of a family on the target, and its truth; notes what references do in it."""
    if installed_entry_point(ctx) is None:
        ctx.not_applicable("the backend was not found by an entry point, as loading a model needs it")
    device = f"{ctx.target.name}:{ctx.target.index}"
    with tiny_model(family, ctx.seed) as tiny, load(tiny.folder, device, context=CONTEXT) as model:
        answered = {c.node.spec.op for c in model.plan.choices.values() if _by_reference(c.implementation.id)}
        if answered:
            ctx.fallback(f"answered by references: {', '.join(sorted(answered))}")
        yield tiny, model


def _by_reference(implementation: str) -> bool:
    # sampling runs on the host by design: it needs one row of logits
    return implementation.startswith("reference.") and implementation != "reference.sampling"


def _one(family: str, ctx: Context) -> None:
    with loaded(ctx, family) as (tiny, model):
        for prompt, wanted in tiny.prompts[:3]:
            _compare(ctx, _run(model, [prompt])[0], wanted, f"prompt of {len(prompt)}")


def _eight(family: str, ctx: Context) -> None:
    with loaded(ctx, family) as (tiny, model):
        got = _run(model, [prompt for prompt, _ in tiny.prompts])
        for tokens, (prompt, wanted) in zip(got, tiny.prompts, strict=True):
            _compare(ctx, tokens, wanted, f"prompt of {len(prompt)}, one of {len(got)}")


def _logits(family: str, ctx: Context) -> None:
    with loaded(ctx, family) as (tiny, model):
        got = model.logits(tiny.long_prompt).double()
        off, bound = _off(got, tiny), LOGITS_OFF
        precision = reduce(Precision.merged, _declared(ctx, model))
        if precision.compute != "float32":
            own = own_logits(family, ctx.seed, precision.compute)
            bound = max(bound, TYPICAL_FACTOR * _off(own, tiny))
        ctx.keep_worst("error", off / bound)
        text = f"{1 - SHARE:.0%} of the tokens have logits off by {off:.3g} of their standard deviation, or more"
        ctx.require(off < bound, f"{text}; {bound:.3g} is allowed with products in {precision.compute}")


def _declared(ctx: Context, model: Model) -> list[Precision]:
    choices = model.plan.choices.values()
    return [ctx.target.expectations.precision_of(c.implementation.id, c.node.spec.formats()) for c in choices]


def _off(got: torch.Tensor, tiny: TinyModel) -> float:
    rows = (got - tiny.long_logits).pow(2).mean(1).sqrt() / tiny.long_logits.std()
    # a token whose last expert hangs by a hair may get another one: the rest shows what the arithmetic is worth
    return float(rows.quantile(SHARE))


def _again(family: str, ctx: Context) -> None:
    with loaded(ctx, family) as (tiny, model):
        first = _run(model, [tiny.prompts[0][0]])[0]
        _run(model, [tiny.long_prompt])
        ctx.require(
            _run(model, [tiny.prompts[0][0]])[0] == first, "the second answer to one prompt differs from the first"
        )


def _plan(family: str, ctx: Context) -> None:
    with loaded(ctx, family) as (_, model):
        device = f"{ctx.target.name}:{ctx.target.index}"
        for layer in model.plan.graph.layers:
            choice = model.plan.choices[layer.attn.name]
            ctx.require(choice.device == device, f"{layer.attn.name} runs on {choice.device}, not on {device}")


def _run(model: Model, prompts: list[list[int]]) -> list[list[int]]:
    """Greedy answers, all prompts as one batch."""
    sequences = [Sequence(list(p), SamplingParams(temperature=0), NEW_TOKENS) for p in prompts]
    for sequence in sequences:
        model.engine.add(sequence)
    with torch.inference_mode():
        while model.engine.step():
            pass
    return [s.new_tokens for s in sequences]


def _compare(ctx: Context, got: list[int], wanted: list[int], what: str) -> None:
    if got != wanted:
        at = next((i for i, (a, b) in enumerate(zip(got, wanted, strict=False)) if a != b), min(len(got), len(wanted)))
        ctx.fail(f"{what}: token {at} is {got[at : at + 1]}, float64 says {wanted[at : at + 1]} (all: {got}, {wanted})")
