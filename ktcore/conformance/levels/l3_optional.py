"""Optional variants that some families need: declared ones must be right, undeclared ones are N/A."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial

from ktcore.conformance.case import Case, Check, Context
from ktcore.conformance.levels import l2_experts
from ktcore.conformance.levels.l2_moe import check_branch
from ktcore.conformance.levels.operator import any_format, check, check_sequences, normal
from ktcore.conformance.levels.specs import attention, experts, linear, mlp, moe
from ktcore.conformance.truth import attention as attention_truth
from ktcore.conformance.truth import small
from ktcore.ops import MoESpec, RMSNormSpec, RopeSpec

LONG = ((5, 40, 1), (1, 1, 33), (1, 1, 1))


def cases() -> list[Case]:
    """Variants by operator."""
    window = {"heads": 4, "kv_heads": 2, "head_dim": 64, "window": 20}
    offset = {"heads": 4, "kv_heads": 2, "head_dim": 64, "qk_norm": True, "offset": 1.0}
    return [
        _case("attention", "window", "keys beyond the window are hidden", partial(_attention, window)),
        _case("attention", "zero-centred-norms", "norms with 1 + weight", partial(_attention, offset)),
        _case("rms_norm", "zero-centred", "a norm with 1 + weight", _zero_centred),
        _case("rope", "freq-factors", "divisors of the frequencies from the checkpoint", _freq_factors),
        *(_case("mlp", a, f"activation {a}", partial(_mlp, a, False)) for a in ("relu", "gelu_tanh")),
        _case("mlp", "bias", "projections with biases", partial(_mlp, "silu", True)),
        _case("experts", "weight-on-input", "the weight multiplies the input", _on_input),
        _case("experts", "relu", "activation relu", _relu),
        _case("moe", "shared-gate", "a gate on the shared part", _shared_gate),
    ]


def _case(op: str, name: str, about: str, run: Check) -> Case:
    return Case(f"L3.{op}.{name}", 3, op, about, run)


def _attention(shape: Mapping[str, object], ctx: Context) -> None:
    fmt = any_format(ctx, lambda f: attention(**shape, fmt=f))  # type: ignore[arg-type]
    spec = attention(**shape, fmt=fmt)  # type: ignore[arg-type]
    check_sequences(ctx, spec, LONG, lambda w, x, a: attention_truth.attention(spec, w, x, a), spec.hidden)


def _zero_centred(ctx: Context) -> None:
    spec, x = RMSNormSpec(256, 1e-6, "F32", 1.0), normal(ctx.rng("x"), 4, 256)
    check(ctx, spec, [x], lambda w, a: small.rms_norm(spec, w, x, a))


def _freq_factors(ctx: Context) -> None:
    import torch

    spec = RopeSpec(64, 1e4, "half", None, True)
    x, positions = normal(ctx.rng("x"), 4, 2, 64), torch.tensor([0, 3, 500, 9000])
    check(ctx, spec, [x, positions], lambda w, a: small.rope(spec, w, x, positions, a))


def _mlp(activation: str, bias: bool, ctx: Context) -> None:
    fmt = any_format(ctx, lambda f: mlp(256, 256, f, activation, bias=bias))
    spec, x = mlp(256, 256, fmt, activation, bias=bias), normal(ctx.rng("x"), 5, 256)
    check(ctx, spec, [x], lambda w, a: small.mlp(spec, w, x, a))


def _on_input(ctx: Context) -> None:
    fmt = any_format(ctx, lambda f: experts(8, 2, 256, 256, f, weight_on_input=True))
    l2_experts.check_spread(ctx, experts(8, 2, 256, 256, fmt, weight_on_input=True), 6)


def _relu(ctx: Context) -> None:
    fmt = any_format(ctx, lambda f: experts(8, 2, 256, 256, f, activation="relu"))
    l2_experts.check_spread(ctx, experts(8, 2, 256, 256, fmt, activation="relu"), 6)


def _shared_gate(ctx: Context) -> None:
    def make(fmt: str) -> MoESpec:
        return replace(moe(256, 8, 2, 256, fmt), shared_gate=linear(256, 1, "F32"))

    check_branch(ctx, make(any_format(ctx, make)), 5)
