"""Grouped-query attention branches: formats, head counts, ragged batches, prefill in chunks, page edges."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

from ktcore.conformance.case import Case, Check, Context
from ktcore.conformance.data.batches import scattered
from ktcore.conformance.data.blocks import FORMATS
from ktcore.conformance.data.memory import make_weights, values
from ktcore.conformance.levels.operator import any_format, check_sequences, first_page_size, normal, run_sequences
from ktcore.conformance.levels.specs import LLAMA3, YARN, attention
from ktcore.conformance.tolerance import compare, same_bits
from ktcore.conformance.truth import attention as truth
from ktcore.conformance.truth.arithmetic import EXACT, Arithmetic
from ktcore.ops import AttentionSpec, RopeSpec

RAGGED = ((5, 9, 1, 0), (1, 1, 1, 12), (1, 3, 1, 1), (1, 1, 1, 1))
SHAPES = ((16, 16, 64), (32, 8, 64), (32, 4, 128), (64, 8, 128), (128, 8, 64), (9, 3, 64), (16, 2, 192))


def cases() -> list[Case]:
    """Formats, shapes, families' variants, batching."""
    found = [
        _case(
            f"{fmt}.ragged",
            "a ragged batch",
            partial(_check, {"heads": 4, "kv_heads": 2, "head_dim": 64, "fmt": fmt}, RAGGED),
            fmt,
        )
        for fmt in FORMATS
    ]
    found += [
        _case(
            f"{h}-heads-{g}-groups-dim-{d}",
            "a ragged batch",
            partial(_check, {"heads": h, "kv_heads": g, "head_dim": d}, RAGGED),
        )
        for h, g, d in SHAPES
    ]
    small = {"heads": 8, "kv_heads": 2, "head_dim": 64}
    turned = dict(small, rope=RopeSpec(64, 1e4, "interleaved"))
    return [
        *found,
        _case("interleaved", "neighbours are paired", partial(_check, turned, RAGGED)),
        _case(
            "llama3",
            "LLaMA 3.1's frequencies",
            partial(_check, dict(small, rope=RopeSpec(64, 5e5, "half", LLAMA3)), RAGGED),
        ),
        _case("yarn", "YaRN's frequencies", partial(_check, dict(small, rope=RopeSpec(64, 1e4, "half", YARN)), RAGGED)),
        _case("qk-norm", "norms of queries and keys, before RoPE", partial(_check, dict(small, qk_norm=True), RAGGED)),
        _case("bias", "biases of query, key and value", partial(_check, dict(small, bias=True), RAGGED)),
        _case("no-rope", "a layer without positions", partial(_check, dict(small, with_rope=False), RAGGED)),
        _case("page-edges", "contexts at the edges of pages", _edges),
        _case("one-token", "a first and only token", partial(_check, small, ((1,),))),
        _case(
            "eight-sequences", "eight of different age", partial(_check, small, ((1, 4, 9, 2, 7, 3, 8, 5), (1,) * 8))
        ),
        _case("long-context", "700 tokens in chunks", partial(_check, small, ((300,), (399,), (1,)))),
        _case("chunks", "a prompt in one piece and in chunks", _chunks),
        _case("company", "a sequence's result does not depend on the others in its batch", _company),
    ]


def _case(name: str, about: str, run: Check, fmt: str | None = None) -> Case:
    return Case(f"L2.attention.{name}", 2, "attention", about, run, fmt)


def _spec(ctx: Context, shape: Mapping[str, object]) -> AttentionSpec:
    if "fmt" in shape:
        return attention(**shape)  # type: ignore[arg-type]
    fmt = any_format(ctx, lambda f: attention(**shape, fmt=f))  # type: ignore[arg-type]
    return attention(**shape, fmt=fmt)  # type: ignore[arg-type]


def _check(shape: Mapping[str, object], steps: Sequence[Sequence[int]], ctx: Context) -> None:
    spec = _spec(ctx, shape)
    check_sequences(ctx, spec, steps, lambda w, x, a: truth.attention(spec, w, x, a), spec.hidden)


def _edges(ctx: Context) -> None:
    spec = _spec(ctx, {"heads": 4, "kv_heads": 2, "head_dim": 64})
    for loaded in ctx.target.load(ctx, spec, make_weights(spec, ctx.rng("probe"))):
        p = first_page_size(ctx, loaded)
        steps = ((p - 1, p, p + 1), (1, 1, 1), (1, 1, p - 1), (1, 1, 1))
        check_sequences(ctx, spec, steps, lambda w, x, a: truth.attention(spec, w, x, a), spec.hidden)


def _chunks(ctx: Context) -> None:
    spec = _spec(ctx, {"heads": 4, "kv_heads": 2, "head_dim": 64})
    weights = make_weights(spec, ctx.rng("weights"))
    x = [normal(ctx.rng("x"), 90, spec.hidden)]
    exact = truth.attention(spec, values(weights), x[0], EXACT)
    for loaded in ctx.target.load(ctx, spec, weights):
        own = truth.attention(spec, values(weights), x[0], Arithmetic.of(loaded.precision))
        for steps in (((90,),), ((64,), (26,)), ((1,), (88,), (1,)), ((30,),) * 3):
            plan = scattered(steps, first_page_size(ctx, loaded), ctx.rng(str(steps)))
            compare(ctx, run_sequences(ctx, loaded, plan, x)[0], exact, own, f"{loaded.id}, chunks {steps}: result")


def _company(ctx: Context) -> None:
    spec = _spec(ctx, {"heads": 4, "kv_heads": 2, "head_dim": 64})
    weights = make_weights(spec, ctx.rng("weights"))
    steps = ((7, 20, 3), (1, 1, 5), (1, 1, 1))
    x = [normal(ctx.rng(f"x{i}"), sum(s[i] for s in steps), spec.hidden) for i in range(3)]
    known = values(weights)
    for loaded in ctx.target.load(ctx, spec, weights):
        size = first_page_size(ctx, loaded)
        together = run_sequences(ctx, loaded, scattered(steps, size, ctx.rng("pages")), x)
        for i in range(3):
            alone = scattered(tuple((s[i],) for s in steps), size, ctx.rng(f"alone {i}"))
            single = run_sequences(ctx, loaded, alone, [x[i]])[0]
            if loaded.precision.batch_invariant:
                same_bits(
                    ctx, together[i], single, f"{loaded.id}: sequence {i} alone and in company, declared invariant"
                )
            exact = truth.attention(spec, known, x[i], EXACT)
            own = truth.attention(spec, known, x[i], Arithmetic.of(loaded.precision))
            compare(ctx, together[i], exact, own, f"{loaded.id}: sequence {i} in company")
            compare(ctx, single, exact, own, f"{loaded.id}: sequence {i} alone")
