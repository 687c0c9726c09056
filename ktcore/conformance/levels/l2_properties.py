"""Properties that every operator must have, whatever it computes: repeatable, apart from neighbours, own work."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from ktcore.conformance.case import Case, Context
from ktcore.conformance.levels.l1_memory import ALLOWED, MIB, grown
from ktcore.conformance.levels.subjects import OPERATORS, TOKENS, flat, run, subject
from ktcore.conformance.levels.watch import HostWork, reference_calls
from ktcore.conformance.tolerance import same_bits

REPEATS = 5
LEAK_ROUNDS = 60


def cases() -> list[Case]:
    """Each property of each operator."""
    found = []
    for op in OPERATORS:
        found += [
            _case(op, "deterministic", "runs of the same give the same bits, where declared", _deterministic),
            _case(op, "own-code", "the work is done by the backend, not handed to a reference or the host", _own_code),
            _case(op, "two-modules", "two loaded with different weights do not mix", _two),
            _case(op, "leak", "calling it often keeps no memory", _leak),
        ]
        if op not in ("attention", "mla", "kv_cache"):
            found += [
                _case(op, "inputs-unchanged", "what it is given stays as it is", _inputs),
                _case(op, "result-stays", "a result is not overwritten by the next call", _stays),
                _case(op, "company", "a token's result does not depend on its neighbours", _company),
                _case(op, "order-of-tokens", "tokens in another order give results in that order", _shuffled),
            ]
    return found


def _case(op: str, name: str, about: str, run_it: Callable[[str, Context], None]) -> Case:
    return Case(f"L2.{op}.{name}", 2, op, about, partial(run_it, op))


def _deterministic(op: str, ctx: Context) -> None:
    given = subject(ctx, op)
    for loaded in ctx.target.load(ctx, given.spec, given.weights):
        if not loaded.precision.deterministic:
            ctx.not_applicable(f"{loaded.id} is not declared deterministic")
        first = run(ctx, loaded, given)
        for i in range(REPEATS):
            same_bits(ctx, first, run(ctx, loaded, given), f"{loaded.id}: run {i + 2} differs from run 1")


def _own_code(op: str, ctx: Context) -> None:
    given = subject(ctx, op)
    for loaded in ctx.target.load(ctx, given.spec, given.weights):
        if not loaded.id.startswith(f"{ctx.target.name}."):
            continue
        foreign = [i for i in loaded.answered_by if not i.startswith(f"{ctx.target.name}.")]
        work = HostWork()
        with reference_calls() as seen:
            if ctx.target.is_host or given.rows is None:
                run(ctx, loaded, given)
            else:
                there = [ctx.target.put(r) for r in given.rows]
                with torch.inference_mode(), ctx.target.runtime.use_stream(ctx.target.stream), work:
                    loaded.module(*there)
                ctx.target.runtime.synchronize(ctx.target.stream)
        ctx.require(
            not seen or bool(foreign), f"{loaded.id} is answered by the reference: {', '.join(sorted(set(seen)))}"
        )
        ctx.require(not work.names, f"{loaded.id} computes on the host: {', '.join(sorted(set(work.names)))}")


def _two(op: str, ctx: Context) -> None:
    one, two = subject(ctx, op, "one"), subject(ctx, op, "two")
    firsts = ctx.target.load(ctx, one.spec, one.weights)
    alone = [run(ctx, loaded, one) for loaded in firsts]
    for first, second, before in zip(firsts, ctx.target.load(ctx, two.spec, two.weights), alone, strict=True):
        run(ctx, second, two)
        _near(ctx, before, run(ctx, first, one), f"{first.id}: another module changed this one's result")
        if op not in ("rope", "kv_cache"):  # without weights there is nothing to tell them apart
            other = run(ctx, second, one)
            ctx.require(not torch.equal(before, other), f"{first.id}: different weights gave the same result")


def _leak(op: str, ctx: Context) -> None:
    given = subject(ctx, op)
    for loaded in ctx.target.load(ctx, given.spec, given.weights):
        run(ctx, loaded, given)
        before = grown(ctx)
        for _ in range(LEAK_ROUNDS):
            run(ctx, loaded, given)
        kept = grown(ctx) - before
        ctx.require(kept < ALLOWED // 4, f"{loaded.id}: {kept // MIB} MiB stay in use after {LEAK_ROUNDS} calls")


def _inputs(op: str, ctx: Context) -> None:
    given = subject(ctx, op)
    assert given.rows is not None
    for loaded in ctx.target.load(ctx, given.spec, given.weights):
        there = [ctx.target.put(r) for r in given.rows]
        with torch.inference_mode(), ctx.target.runtime.use_stream(ctx.target.stream):
            loaded.module(*there)
        for before, after in zip(given.rows, there, strict=True):
            same_bits(ctx, before, ctx.target.get(after), f"{loaded.id} changed its input")


def _stays(op: str, ctx: Context) -> None:
    one, two = subject(ctx, op, "one"), subject(ctx, op, "two")
    assert one.rows is not None
    assert two.rows is not None
    target = ctx.target
    for loaded in target.load(ctx, one.spec, one.weights):
        wanted = run(ctx, loaded, one)
        here, there = [target.put(r) for r in one.rows], [target.put(r) for r in two.rows]
        with torch.inference_mode(), target.runtime.use_stream(target.stream):
            kept = loaded.module(*here)
            loaded.module(*there)
        got = tuple(target.get(k) for k in kept) if isinstance(kept, tuple) else target.get(kept)
        _near(ctx, wanted, flat(got), f"{loaded.id}: the next call overwrote a result")


def _company(op: str, ctx: Context) -> None:
    given = subject(ctx, op)
    assert given.rows is not None
    for loaded in ctx.target.load(ctx, given.spec, given.weights):
        together = run(ctx, loaded, given)
        for i in range(TOKENS):
            alone = flat(ctx.target.call(loaded.module, *(r[i : i + 1] for r in given.rows)))
            reason = f"{loaded.id}: token {i} alone and in a batch of {TOKENS}"
            if loaded.precision.batch_invariant:
                same_bits(ctx, together[i : i + 1], alone, f"{reason}, declared invariant")
            _near(ctx, together[i : i + 1], alone, reason)


def _shuffled(op: str, ctx: Context) -> None:
    given = subject(ctx, op)
    assert given.rows is not None
    order = torch.from_numpy(ctx.rng("order").permutation(TOKENS))
    for loaded in ctx.target.load(ctx, given.spec, given.weights):
        there = flat(ctx.target.call(loaded.module, *(r[order] for r in given.rows)))
        _near(ctx, run(ctx, loaded, given)[order], there, f"{loaded.id}: another order of tokens")


def _near(ctx: Context, a: torch.Tensor, b: torch.Tensor, reason: str) -> None:
    """Equal up to the order of summation in the implementation's precision: both are its own results."""
    ctx.require(a.shape == b.shape, f"{reason}: shapes {list(a.shape)} and {list(b.shape)}")
    top = max(float(a.abs().max()), 1e-6)
    off = float((a.double() - b.double()).abs().max()) / top
    ctx.require(off < 1e-3, f"{reason}: results differ by {off:.2g} of the largest value")
