"""What is not a number stays with its token and reaches all of it: through activations in 8 bits, clamps, maxima."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch

from ktcore.conformance.case import Case, Check, Context
from ktcore.conformance.data.batches import Plan, batches, scattered
from ktcore.conformance.data.blocks import FORMATS
from ktcore.conformance.data.memory import make_weights, values
from ktcore.conformance.levels.l2_kv_cache import run_plan
from ktcore.conformance.levels.operator import any_format, first_page_size, normal, run_sequences
from ktcore.conformance.levels.specs import attention, experts, linear, mla, mlp, moe, norm, router_v3
from ktcore.conformance.target import Loaded
from ktcore.conformance.tolerance import compare
from ktcore.conformance.truth import attention as truth
from ktcore.conformance.truth.arithmetic import EXACT, Arithmetic
from ktcore.ops import AttentionSpec, ExpertsSpec, KVCacheSpec, MLASpec, RouterSpec, Spec
from ktcore.ops.mlp import ClampedGLU

NAN, INF = float("nan"), float("inf")
HIDDEN = 256
CLAMPED = ClampedGLU(1.702, 7.0)
ROUTERS = {
    "softmax": RouterSpec(HIDDEN, 64, 6, "F32", renormalise=True),
    "groups": RouterSpec(HIDDEN, 64, 6, "F32", groups=8, groups_kept=3),
    "sigmoid-groups": router_v3(HIDDEN, 64, 6),
}

_FREED = "what is not a number and was left on pages, times a weight of zero, is nothing to who has them next"
_LATER = ((19, 2, 5), (1, 1, 0), (2, 15, 1), (1, 1, 1))


def cases() -> list[Case]:
    """Each format, since its activations have a precision of their own, and each operator with a maximum or a clamp."""
    found = [_case(f"linear.{fmt}", "linear", partial(_linear, fmt), fmt) for fmt in FORMATS]
    found += [_case(f"experts.{fmt}", "experts", partial(_experts, fmt, "silu"), fmt) for fmt in FORMATS]
    found += [_case(f"experts.{kind}", "experts", partial(_experts, None, kind)) for kind in ("relu", "gelu_tanh")]
    found += [_case(f"router.{name}", "router", partial(_router, spec)) for name, spec in ROUTERS.items()]
    caches = {"gqa": KVCacheSpec("gqa", 8, 2, 64, 64), "mla": KVCacheSpec("mla", 8, 1, 96, 64)}
    found += [_case(f"kv_cache.{kind}.query", "kv_cache", partial(_query, spec)) for kind, spec in caches.items()]
    found += [
        Case(f"L2.nonfinite.kv_cache.{kind}.freed-pages", 2, "kv_cache", _FREED, partial(_freed, spec))
        for kind, spec in caches.items()
    ]
    for operator, freed in (("attention", _freed_attention), ("mla", _freed_mla)):
        found.append(Case(f"L2.nonfinite.{operator}.freed-pages", 2, operator, _FREED, freed))
    return [
        *found,
        _case("experts.clamped", "experts", partial(_experts, None, "clamped")),
        _case("mlp", "mlp", _mlp),
        _case("moe", "moe", _moe),
        _case("rms_norm", "rms_norm", _norm),
        _case("attention", "attention", _attention),
        _case("mla", "mla", _mla),
    ]


def _case(name: str, operator: str, run: Check, fmt: str | None = None) -> Case:
    about = "a token with NaN or Inf gives no number, and the others do not see it"
    return Case(f"L2.nonfinite.{name}", 2, operator, about, run, fmt)


def _linear(fmt: str, ctx: Context) -> None:
    _rows(ctx, linear(HIDDEN, 64, fmt), HIDDEN)


def _mlp(ctx: Context) -> None:
    _rows(ctx, mlp(HIDDEN, HIDDEN, any_format(ctx, lambda f: mlp(HIDDEN, HIDDEN, f))), HIDDEN)


def _moe(ctx: Context) -> None:
    _rows(ctx, moe(HIDDEN, 8, 2, HIDDEN, any_format(ctx, lambda f: moe(HIDDEN, 8, 2, HIDDEN, f))), HIDDEN)


def _norm(ctx: Context) -> None:
    _rows(ctx, norm(HIDDEN), HIDDEN, whole=False)


def _experts(fmt: str | None, kind: str, ctx: Context) -> None:
    activation = "silu" if kind == "clamped" else kind
    spec = experts(
        8, 2, 256, 256, fmt or any_format(ctx, lambda f: experts(8, 2, 256, 256, f, activation=activation)),
        activation=activation,
    )  # fmt: skip
    # Inf leaves a clamp as its limit, by right
    if kind == "clamped":
        spec = replace(spec, clamped=CLAMPED)
    _rows(ctx, spec, 256, bad=(NAN,) if kind == "clamped" else (NAN, INF, -INF))


def _rows(ctx: Context, spec: Spec, width: int, bad: tuple[float, ...] = (NAN, INF, -INF), whole: bool = True) -> None:
    """Few tokens and many: kernels differ. `whole`: every value of a bad token's result depends on every input."""
    for loaded in ctx.target.load(ctx, spec, make_weights(spec, ctx.rng("weights"))):
        for tokens in (2 + len(bad), 37):
            x = normal(ctx.rng(f"x {tokens}"), tokens, width)
            at = torch.arange(1, 1 + len(bad))
            x[at, torch.tensor([77, 0, width - 1])[: len(bad)]] = torch.tensor(bad)
            extra: list[torch.Tensor] = []
            if isinstance(spec, ExpertsSpec):
                extra = [torch.arange(2).repeat(tokens, 1), torch.full((tokens, 2), 0.5)]
            _judge(ctx, f"{loaded.id}, {tokens} tokens", ctx.target.call(loaded.module, x, *extra), at, whole)


def _judge(ctx: Context, name: str, got: torch.Tensor, bad: torch.Tensor, whole: bool = True) -> None:
    finite = torch.isfinite(got).flatten(1)
    clean = torch.ones(got.shape[0], dtype=torch.bool)
    clean[bad] = False
    ctx.require(bool(finite[clean].all()), f"{name}: what is not a number in one token spoils others")
    for row in bad.tolist():
        kept = bool(finite[row].any() if whole else finite[row].all())
        ctx.require(not kept, f"{name}: token {row} had NaN or Inf, and its result has numbers")


def _router(spec: RouterSpec, ctx: Context) -> None:
    for loaded in ctx.target.load(ctx, spec, make_weights(spec, ctx.rng("weights"))):
        for tokens in (3, 37):
            x = normal(ctx.rng(f"x {tokens}"), tokens, spec.hidden)
            x[1, 77] = NAN
            ids, weights = ctx.target.call(loaded.module, x)
            valid = bool(((ids >= 0) & (ids < spec.experts)).all())
            ctx.require(valid, f"{loaded.id}: the choice of a token with NaN is outside of the {spec.experts} experts")
            apart = all(len(set(row)) == spec.top_k for row in ids.tolist())
            ctx.require(apart, f"{loaded.id}: an expert is chosen twice")
            _judge(ctx, f"{loaded.id}, {tokens} tokens", weights, torch.tensor([1]))


def _query(spec: KVCacheSpec, ctx: Context) -> None:
    """In a prompt, in a step of few tokens, and far into a context, which is split."""
    widths = (spec.value_dim, spec.key_dim - spec.value_dim) if spec.kind == "mla" else (spec.key_dim, spec.value_dim)
    heads = () if spec.kind == "mla" else (spec.kv_heads,)
    for loaded in ctx.target.load(ctx, spec, {}):
        plan = scattered(((7, 600), (1, 1), (2, 1)), loaded.page_sizes[0], ctx.rng("pages"))
        loaded.allocate(plan.pages, plan.page_size)
        rng = ctx.rng("values")
        for number, (step, _) in enumerate(batches(plan)):
            ctx.target.call(loaded.module.append, step, *(normal(rng, step.tokens, *heads, w) for w in widths))
            q = normal(rng, step.tokens, spec.heads, spec.key_dim)
            bad = torch.tensor([1])
            q[bad] = NAN
            got = ctx.target.call(loaded.module.attend, step, q, 0.125)
            _judge(ctx, f"{loaded.id}, step {number}", got, bad)


def _freed(spec: KVCacheSpec, ctx: Context) -> None:
    """Every row of every page holds NaN or Inf; then others have them, whose contexts end within a page."""
    widths = (spec.value_dim, spec.key_dim - spec.value_dim) if spec.kind == "mla" else (spec.key_dim, spec.value_dim)
    heads = () if spec.kind == "mla" else (spec.kv_heads,)
    for loaded in ctx.target.load(ctx, spec, {}):
        for size in sorted({min(loaded.page_sizes), max(loaded.page_sizes)}):
            for value in (NAN, INF):
                plan = scattered(_LATER, size, ctx.rng("pages"))
                loaded.allocate(plan.pages, size)
                for step, _ in batches(_everything(plan)):
                    spoiled = [torch.full((step.tokens, *heads, width), value) for width in widths]
                    ctx.target.call(loaded.module.append, step, *spoiled)
                run_plan(ctx, loaded, spec, plan, None, f"pages of {size} that held {value}")


def _freed_attention(ctx: Context) -> None:
    spec = attention(4, 2, 64, any_format(ctx, lambda f: attention(4, 2, 64, f)))
    _freed_branch(ctx, spec, lambda w, x, a: truth.attention(spec, w, x, a))


def _freed_mla(ctx: Context) -> None:
    spec = mla(4, any_format(ctx, lambda f: mla(4, f, latent=256)), latent=256)
    _freed_branch(ctx, spec, lambda w, x, a: truth.mla(spec, w, x, a))


def _freed_branch(
    ctx: Context,
    spec: AttentionSpec | MLASpec,
    whole: Callable[[dict[str, torch.Tensor], torch.Tensor, Arithmetic], torch.Tensor],
) -> None:
    """As `_freed`, for branches whose cache is their own affair."""
    weights = make_weights(spec, ctx.rng("weights"))
    known = values(weights)
    for loaded in ctx.target.load(ctx, spec, weights):
        plan = scattered(_LATER, first_page_size(ctx, loaded), ctx.rng("pages"))
        inputs = [normal(ctx.rng(f"x {i}"), n, spec.hidden) for i, n in enumerate(plan.lengths())]
        got = run_sequences(ctx, loaded, plan, inputs, before=partial(_spoil, ctx, loaded, plan, spec.hidden))
        results = [
            torch.cat([whole(known, x, arithmetic) for x in inputs])
            for arithmetic in (EXACT, Arithmetic.of(loaded.precision))
        ]
        compare(ctx, torch.cat(got), results[0], results[1], f"{loaded.id}: result on pages that held NaN")


def _spoil(ctx: Context, loaded: Loaded, plan: Plan, hidden: int) -> None:
    for step, _ in batches(_everything(plan)):
        ctx.target.call(loaded.module, torch.full((step.tokens, hidden), NAN), step)


def _everything(plan: Plan) -> Plan:
    """One sequence that has every page, to the last row."""
    tokens = plan.pages * plan.page_size
    return Plan(((tokens,),), plan.page_size, plan.pages, (tuple(range(plan.pages)),))


def _attention(ctx: Context) -> None:
    _branch(ctx, attention(4, 2, 64, any_format(ctx, lambda f: attention(4, 2, 64, f))))


def _mla(ctx: Context) -> None:
    _branch(ctx, mla(4, any_format(ctx, lambda f: mla(4, f, latent=256)), latent=256))


def _branch(ctx: Context, spec: AttentionSpec | MLASpec) -> None:
    """The last token of the first of two sequences; then others take their pages, and see nothing of what is left.

    Earlier tokens of its own sequence may be spoiled too: a weight of zero times a value that is no number.
    """
    for value in (NAN, INF):
        for loaded in ctx.target.load(ctx, spec, make_weights(spec, ctx.rng("weights"))):
            plan = scattered(((5, 9), (1, 1)), loaded.page_sizes[0], ctx.rng("pages"))
            loaded.allocate(plan.pages, plan.page_size)
            for number, (step, _) in enumerate(batches(plan)):
                x = normal(ctx.rng(f"x {number}"), step.tokens, spec.hidden)
                first = int(step.q_start[1])
                x[first - 1, 77] = value
                got = ctx.target.call(loaded.module, x, step)[first - 1 :]
                _judge(ctx, f"{loaded.id}, step {number}", got, torch.tensor([0]))
            for step, _ in batches(replace(plan, steps=((2, 2), (1, 1)))):
                got = ctx.target.call(loaded.module, normal(ctx.rng("later"), step.tokens, spec.hidden), step)
                clean = bool(torch.isfinite(got).all())
                ctx.require(clean, f"{loaded.id}: a sequence sees NaN or Inf that another left on its pages")
