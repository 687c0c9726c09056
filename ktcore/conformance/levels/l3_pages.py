"""Memory that leaves the device and comes back: `page_tensors` and `state_tensors` give all of a page or slot."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import torch

from ktcore.backend.implementation import PageTensors, StateTensors
from ktcore.conformance.case import Case, Context
from ktcore.conformance.data.batches import scattered
from ktcore.conformance.data.memory import make_weights, values
from ktcore.conformance.levels.l3_delta_net import DELTA, KIMI, Kind
from ktcore.conformance.levels.operator import any_format, first_page_size, normal, run_sequences
from ktcore.conformance.levels.specs import attention, mla
from ktcore.conformance.levels.specs_compressed import compressed
from ktcore.conformance.target import Loaded
from ktcore.conformance.tolerance import compare
from ktcore.conformance.truth import attention as attention_truth
from ktcore.conformance.truth.arithmetic import EXACT, Arithmetic
from ktcore.conformance.truth.compressed import attention as compressed_truth
from ktcore.ops import CompressedAttentionSpec, Spec

BEGIN, MORE = 40, 9


def cases() -> list[Case]:
    """By what holds the memory."""
    return [
        _case("attention", "pages", _attention),
        _case("mla", "pages", _mla),
        _case("gated_delta_net", "states", partial(_recurrent, DELTA)),
        _case("kimi_delta_attention", "states", partial(_recurrent, KIMI)),
        _case("compressed_attention", "pages-and-states", _compressed),
    ]


def _case(op: str, what: str, run: Callable[[Context], None]) -> Case:
    about = f"a sequence goes on from {what} that were copied to the host and back"
    return Case(f"L3.{op}.kept-{what}", 3, op, about, run)


def _attention(ctx: Context) -> None:
    spec = attention(4, 2, 64, any_format(ctx, lambda f: attention(4, 2, 64, f)))
    _goes_on(ctx, spec, lambda w, x, a: attention_truth.attention(spec, w, x, a), _pages)


def _mla(ctx: Context) -> None:
    spec = mla(4, any_format(ctx, lambda f: mla(4, f, latent=256)), latent=256)
    _goes_on(ctx, spec, lambda w, x, a: attention_truth.mla(spec, w, x, a), _pages)


def _recurrent(kind: Kind, ctx: Context) -> None:
    if not any(i.spec_type is kind.spec_type for i in ctx.target.implementations):
        ctx.not_applicable(f"no {ctx.target.name}.* implementation of {kind.spec_type.op}")
    spec = kind.make(**kind.small, fmt=any_format(ctx, lambda f: kind.make(**kind.small, fmt=f)))
    _goes_on(ctx, spec, lambda w, x, a: kind.truth(spec, w, x, a), _states)


def _compressed(ctx: Context) -> None:
    if not any(i.spec_type is CompressedAttentionSpec for i in ctx.target.implementations):
        ctx.not_applicable(f"no {ctx.target.name}.* implementation of compressed_attention")
    spec = compressed(any_format(ctx, lambda f: compressed(f, 8), ("BF16", "F16", "F32")), 8)

    def memory(ctx: Context, loaded: Loaded) -> list[torch.Tensor]:
        return [*_pages(ctx, loaded), *_states(ctx, loaded)]

    _goes_on(ctx, spec, lambda w, x, a: compressed_truth(spec, w, x, a), memory)


Truth = Callable[[dict[str, torch.Tensor], torch.Tensor, Arithmetic], torch.Tensor]
Memory = Callable[[Context, Loaded], Sequence[torch.Tensor]]


def _goes_on(ctx: Context, spec: Spec, truth: Truth, memory: Memory) -> None:
    weights = make_weights(spec, ctx.rng("weights"))
    known, x = values(weights), normal(ctx.rng("x"), BEGIN + MORE, spec.hidden)  # type: ignore[attr-defined]
    exact = truth(known, x, EXACT)[BEGIN:]
    for loaded in ctx.target.load(ctx, spec, weights):
        size = first_page_size(ctx, loaded) if loaded.caches else 16
        plan = replace(scattered(((BEGIN,), (MORE,)), size, ctx.rng("pages")), slots=(1,))
        loaded.allocate_states(3)
        run_sequences(ctx, loaded, replace(plan, steps=plan.steps[:1]), [x])
        kept = [ctx.target.get(tensor) for tensor in memory(ctx, loaded)]
        got = run_sequences(ctx, loaded, plan, [x], skip=1, before=partial(_restore, ctx, loaded, memory, kept))[0]
        own = truth(known, x, Arithmetic.of(loaded.precision))[BEGIN:]
        compare(ctx, got, exact, own, f"{loaded.id}: what follows")


def _restore(ctx: Context, loaded: Loaded, memory: Memory, kept: Sequence[torch.Tensor]) -> None:
    """Spoil the memory, then copy what was kept into it."""
    loaded.allocate_states(3)
    for there, held in zip(memory(ctx, loaded), kept, strict=True):
        ctx.target.restore(there, held)


def _pages(ctx: Context, loaded: Loaded) -> list[torch.Tensor]:
    found: list[torch.Tensor] = []
    for cache, _ in loaded.caches:
        if not isinstance(cache, PageTensors):
            ctx.not_applicable(f"{loaded.id}: its cache has no page_tensors, so prefixes stay on the device")
        found += _checked(ctx, loaded, cache.page_tensors())
    return found


def _states(ctx: Context, loaded: Loaded) -> list[torch.Tensor]:
    found: list[torch.Tensor] = []
    for state in loaded.states:
        if not isinstance(state, StateTensors):
            ctx.not_applicable(f"{loaded.id}: its states have no state_tensors, so prefixes stay on the device")
        found += _checked(ctx, loaded, state.state_tensors())
    return found


def _checked(ctx: Context, loaded: Loaded, tensors: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
    ctx.require(all(t.is_contiguous() for t in tensors), f"{loaded.id}: a tensor of its memory is not contiguous")
    return tensors
