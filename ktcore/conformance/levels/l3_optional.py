"""Optional variants that some families need, of the operators without a cache: declared ones must be right, undeclared
ones are N/A. A case for every optional field; `ktcore.conformance.fields` says which."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import torch

from ktcore.conformance.case import Case, Check, Context
from ktcore.conformance.levels import l2_experts
from ktcore.conformance.levels.l2_moe import check_branch
from ktcore.conformance.levels.l2_router import check_nothing_left, check_router
from ktcore.conformance.levels.operator import ORDERED, SIMPLE_FORMATS, any_format, check, normal
from ktcore.conformance.levels.specs import experts, linear, mlp, moe, norm
from ktcore.conformance.truth import small
from ktcore.ops import (
    ClampedGLU,
    EmbeddingSpec,
    ExpertsSpec,
    LinearSpec,
    MLPSpec,
    MoESpec,
    RMSNormSpec,
    RopeScaling,
    RopeSpec,
    RouterSpec,
)

HIDDEN, WIDE = 256, 256
POSITIONS = (0, 1, 7, 40, 77, 99)
SCALINGS = {
    "llama3-bands": RopeScaling("llama3", 8.0, 4096, low_freq_factor=2.0, high_freq_factor=16.0),
    "yarn-bands": RopeScaling("yarn", 8.0, 4096, beta_fast=8.0, beta_slow=2.0),
    "yarn-mscale": RopeScaling("yarn", 40.0, 4096, mscale=0.5, mscale_all_dim=1.0),
    "yarn-attention-factor": RopeScaling("yarn", 8.0, 4096, attention_factor=1.5),
    "yarn-untruncated": RopeScaling("yarn", 8.0, 4096, truncate=False),
}


CLAMPED = {
    "clamped-swiglu": ("SwiGLU of what is within the limit", ClampedGLU(1.0, 0.8, 0.0)),
    "clamped-after": ("SwiGLU whose activation is within the limit", ClampedGLU(1.0, 0.4, 0.0, True)),
}


def cases() -> list[Case]:
    """By operator."""
    logits = RouterSpec(64, 16, 4, "F32", on_logits=True)
    shifted = replace(logits, logit_bias=True)
    return [
        _case("rms_norm", "zero-centred", "a norm with 1 + weight", partial(_norm, RMSNormSpec(256, 1e-6, "F32", 1.0))),
        _case("rms_norm", "no-weight", "a norm without a weight", partial(_norm, RMSNormSpec(256, 1e-6, ""))),
        _case("rms_norm", "scaled", "a norm times a factor", partial(_norm, RMSNormSpec(256, 1e-6, scale=0.3))),
        _case("rope", "first-pairs", "only the first pairs turn", partial(_rope, RopeSpec(64, 1e4, "half", turning=8))),
        _case("linear", "softcap", "a result that never grows beyond a cap", _softcap),
        _case("embedding", "scaled", "rows times a factor", _scaled_rows),
        _case("rope", "freq-factors", "divisors of the frequencies from the checkpoint", _freq_factors),
        _case("rope", "theta", "a base of its own", partial(_rope, RopeSpec(64, 5e5, "half"))),
        *(_case("rope", n, f"scaled: {n}", partial(_rope, RopeSpec(64, 1e4, "half", s))) for n, s in SCALINGS.items()),
        _case("linear", "ordered", "columns that are stored in another order than the input's", _ordered),
        _case("mlp", "ordered", "columns in another order, in each projection its own", _ordered_mlp),
        *(_case("mlp", n, f"activation {n}", partial(_mlp, _activated(n))) for n in ("relu", "gelu_tanh")),
        _case("mlp", "bias", "projections with biases", partial(_mlp, _biased)),
        _case("mlp", "post-norm", "a norm of the result", partial(_mlp, lambda s: replace(s, post_norm=norm(HIDDEN)))),
        _case("mlp", "out-scale", "a stored factor of the end", partial(_mlp, lambda s: replace(s, out_scale=True))),
        _case(
            "router",
            "expert-scale",
            "a factor of each expert",
            partial(check_router, RouterSpec(64, 16, 4, "F32", renormalise=True, expert_scale=True), 33),
        ),
        _case("router", "logit-bias", "a bias of the logits", partial(check_router, shifted, 33)),
        _case("router", "on-logits", "chosen by logits, softmax over the chosen", partial(check_router, logits, 33)),
        _case(
            "router",
            "on-logits-sigmoid",
            "chosen by logits, each weighed by itself",
            partial(check_router, replace(logits, score="sigmoid"), 33),
        ),
        _case(
            "router",
            "nothing-left-on-logits",
            "logits of -inf: still different experts, the lowest ids first",
            partial(check_nothing_left, shifted, (2, 11)),
        ),
        _case(
            "router",
            "renorm-eps",
            "a sum of weights that is never zero",
            partial(check_router, RouterSpec(64, 16, 4, "F32", renormalise=True, renorm_eps=0.25), 33),
        ),
        _case(
            "router",
            "group-of-two",
            "groups kept one, scored by their two best",
            partial(check_router, RouterSpec(64, 32, 4, "F32", "sigmoid", False, 4, 2, "top2_sum"), 33),
        ),
        _case(
            "experts",
            "weight-on-input",
            "the weight multiplies the input",
            partial(_experts, {"weight_on_input": True}, SIMPLE_FORMATS),
        ),
        _case("experts", "relu", "activation relu", partial(_experts, {"activation": "relu"}, SIMPLE_FORMATS)),
        _case("experts", "ordered", "columns in another order, in each expert its own", partial(_experts, {}, ORDERED)),
        _case("experts", "bias", "biases of every projection", partial(_experts, {"bias": True}, SIMPLE_FORMATS)),
        _case(
            "experts",
            "clamped",
            "gpt-oss's activation",
            partial(_experts, {"clamped": ClampedGLU(1.702, 0.8)}, SIMPLE_FORMATS),
        ),
        _case(
            "experts",
            "clamped-bias",
            "gpt-oss's experts whole",
            partial(_experts, {"clamped": ClampedGLU(1.702, 0.8), "bias": True}, SIMPLE_FORMATS),
        ),
        *(
            _case("experts", name, about, partial(_experts, {"clamped": kind}, SIMPLE_FORMATS))
            for name, (about, kind) in CLAMPED.items()
        ),
        *(_case("mlp", name, about, partial(_mlp, _clamped(kind))) for name, (about, kind) in CLAMPED.items()),
        _case("mlp", "clamped", "gpt-oss's activation", partial(_mlp, _clamped(ClampedGLU(1.702, 0.8)))),
        _case("moe", "clamped-shared", "limits of its own for each part", partial(_moe, _clamped_parts)),
        _case("moe", "dense-apart", "a dense part with norms of its own", partial(_moe, _with_dense_part)),
        _case("moe", "router-norm", "a router with a norm of its own", partial(_moe, _with_router_norm)),
        _case("moe", "routed-norm", "a norm of the routed sum", partial(_moe, _with_norm("routed_norm"))),
        _case("moe", "post-norm", "a norm of the result", partial(_moe, _with_norm("post_norm"))),
        _case("moe", "out-scale", "a stored factor of the end", partial(_moe, lambda s: replace(s, out_scale=True))),
        _case("moe", "shared-gate", "a gate on the shared part", partial(_moe, _with_gate)),
        _case("moe", "no-residual", "the branch alone", partial(_moe, lambda s: replace(s, residual=False))),
        _case("moe", "no-norm", "without a norm of the input", partial(_moe, lambda s: replace(s, norm=None))),
        _case(
            "moe",
            "early-router",
            "a router that reads what the layer got",
            partial(_moe, lambda s: replace(s, early_router=True)),
        ),
    ]


def _case(op: str, name: str, about: str, run: Check) -> Case:
    return Case(f"L3.{op}.{name}", 3, op, about, run)


def _norm(spec: RMSNormSpec, ctx: Context) -> None:
    x = normal(ctx.rng("x"), 4, spec.dim)
    check(ctx, spec, [x], lambda w, a: small.rms_norm(spec, w, x, a))


def _rope(spec: RopeSpec, ctx: Context) -> None:
    x, positions = normal(ctx.rng("x"), len(POSITIONS), 2, 64), torch.tensor(POSITIONS)
    check(ctx, spec, [x, positions], lambda w, a: small.rope(spec, w, x, positions, a))


def _freq_factors(ctx: Context) -> None:
    _rope(RopeSpec(64, 1e4, "half", None, True), ctx)


def _softcap(ctx: Context) -> None:
    def make(fmt: str) -> LinearSpec:
        return replace(linear(HIDDEN, 64, fmt), softcap=1.5)

    spec, x = make(any_format(ctx, make)), 2 * normal(ctx.rng("x"), 5, HIDDEN)
    check(ctx, spec, [x], lambda w, a: small.linear(spec, w, x, a))


def _scaled_rows(ctx: Context) -> None:
    def make(fmt: str) -> EmbeddingSpec:
        return EmbeddingSpec(40, HIDDEN, fmt, 7.5)

    spec, ids = make(any_format(ctx, make)), torch.tensor([3, 39, 0])
    check(ctx, spec, [ids], lambda w, a: a.cast(w["weight"])[ids] * spec.scale)


def _ordered(ctx: Context) -> None:
    def make(fmt: str) -> LinearSpec:
        return linear(HIDDEN, 64, fmt)

    spec, x = make(any_format(ctx, make, ORDERED)), normal(ctx.rng("x"), 5, HIDDEN)
    check(ctx, spec, [x], lambda w, a: small.linear(spec, w, x, a))


def _ordered_mlp(ctx: Context) -> None:
    _mlp(lambda spec: spec, ctx, ORDERED)


def _mlp(change: Callable[[MLPSpec], MLPSpec], ctx: Context, formats: Sequence[str] = SIMPLE_FORMATS) -> None:
    def make(fmt: str) -> MLPSpec:
        return change(mlp(HIDDEN, WIDE, fmt))

    spec, x = make(any_format(ctx, make, formats)), normal(ctx.rng("x"), 5, HIDDEN)
    check(ctx, spec, [x], lambda w, a: small.mlp(spec, w, x, a))


def _activated(name: str) -> Callable[[MLPSpec], MLPSpec]:
    return lambda spec: replace(spec, activation=name)


def _clamped(kind: ClampedGLU) -> Callable[[MLPSpec], MLPSpec]:
    return lambda spec: replace(spec, clamped=kind)


def _clamped_parts(spec: MoESpec) -> MoESpec:
    assert spec.shared is not None, "this branch has a shared part"
    shared = replace(spec.shared, clamped=ClampedGLU(1.0, 0.4, 0.0, True))
    return replace(spec, experts=replace(spec.experts, clamped=ClampedGLU(1.0, 0.8, 0.0)), shared=shared)


def _biased(spec: MLPSpec) -> MLPSpec:
    gate, up, down = (replace(part, bias=True) for part in (spec.gate, spec.up, spec.down))
    return replace(spec, gate=gate, up=up, down=down)


def _experts(changes: dict[str, object], formats: Sequence[str], ctx: Context) -> None:
    def make(fmt: str) -> ExpertsSpec:
        return replace(experts(8, 2, HIDDEN, WIDE, fmt), **changes)  # type: ignore[arg-type]

    l2_experts.check_spread(ctx, make(any_format(ctx, make, formats)), 6)


def _moe(change: Callable[[MoESpec], MoESpec], ctx: Context) -> None:
    def make(fmt: str) -> MoESpec:
        return change(moe(HIDDEN, 8, 2, WIDE, fmt))

    check_branch(ctx, make(any_format(ctx, make)), 5)


def _with_gate(spec: MoESpec) -> MoESpec:
    return replace(spec, shared_gate=linear(HIDDEN, 1, "F32"))


def _with_dense_part(spec: MoESpec) -> MoESpec:
    shared = mlp(HIDDEN, spec.experts.intermediate, spec.experts.gate_format, branch=False)
    return replace(spec, shared=replace(shared, norm=norm(HIDDEN), post_norm=norm(HIDDEN)), shared_apart=True)


def _with_router_norm(spec: MoESpec) -> MoESpec:
    return replace(spec, router_norm=replace(norm(HIDDEN), scale=1.5))


def _with_norm(role: str) -> Callable[[MoESpec], MoESpec]:
    return lambda spec: replace(spec, **{role: norm(HIDDEN)})  # type: ignore[arg-type]
