"""The kit's truth against torch and transformers, the weights it draws, and what it takes for near enough."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from ktcore.conformance.case import Case, Context, Failure
from ktcore.conformance.data.memory import _own
from ktcore.conformance.levels import specs
from ktcore.conformance.tolerance import compare, same_bits
from ktcore.conformance.truth.arithmetic import EXACT
from ktcore.conformance.truth.attention import causal
from ktcore.conformance.truth.moe import experts, router
from ktcore.conformance.truth.small import _frequencies, linear, mlp, rms_norm
from ktcore.ops import ExpertsSpec, LinearSpec, MLPSpec, RMSNormSpec, RopeScaling, RopeSpec, RouterSpec

from .plain import plain_target

F = torch.nn.functional
HIDDEN = 6


def random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(len(shape) + shape[-1]))


def same(got: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("bias", [False, True])
def test_linear_and_norm_are_torchs(bias: bool) -> None:
    w = {"weight": random(4, HIDDEN)} | ({"bias": random(4)} if bias else {})
    same(linear(LinearSpec(HIDDEN, 4, "F32", bias=bias), w, random(3, HIDDEN), EXACT), F.linear(random(3, HIDDEN), **w))
    norm = RMSNormSpec(HIDDEN, 1e-3, "F32" if bias else "", offset=0.5)
    weight = random(HIDDEN)
    expected = F.rms_norm(random(3, HIDDEN), (HIDDEN,), weight + 0.5 if bias else None, 1e-3)
    same(rms_norm(norm, {"weight": weight}, random(3, HIDDEN), EXACT), expected)


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("activation", ["silu", "relu", "gelu_tanh"])
def test_an_mlp_is_torchs(activation: str, residual: bool) -> None:
    x, names = random(3, HIDDEN), ("gate", "up", "down")
    w = {f"{name}.weight": random(HIDDEN, HIDDEN) * (i + 1) for i, name in enumerate(names)}
    parts = [LinearSpec(HIDDEN, HIDDEN, "F32")] * 3
    act = {"silu": F.silu, "relu": F.relu, "gelu_tanh": lambda t: F.gelu(t, approximate="tanh")}[activation]
    gate, up, down = w.values()
    expected = (act(x @ gate.T) * (x @ up.T)) @ down.T + (x if residual else 0)
    same(mlp(MLPSpec(HIDDEN, HIDDEN, activation, *parts, residual=residual), w, x, EXACT), expected)


@pytest.mark.parametrize(
    ("dim", "theta", "scaling"),
    [
        (8, 1e4, None),
        (128, 5e5, {"rope_type": "linear", "factor": 4.0}),
        (
            128,
            5e5,
            {"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 8192}
            | {"low_freq_factor": 1.0, "high_freq_factor": 4.0},
        ),
        (64, 1e4, {"rope_type": "yarn", "factor": 16.0, "original_max_position_embeddings": 4096}),
        # the band of the blend ends beyond the last pair
        (8, 4.0, {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 261}),
    ],
)
def test_frequencies_are_transformers(dim: int, theta: float, scaling: dict[str, Any] | None) -> None:
    parameters = {"rope_theta": theta} | (scaling or {"rope_type": "default"})
    config = LlamaConfig(
        hidden_size=dim,
        num_attention_heads=1,
        head_dim=dim,
        rope_parameters=parameters,
        max_position_embeddings=1 << 17,
    )
    if scaling is None:
        theirs, factor = 1.0 / theta ** (torch.arange(0, dim, 2).double() / dim), 1.0
        spec = RopeSpec(dim, theta, "half")
    else:
        theirs, factor = ROPE_INIT_FUNCTIONS[str(scaling["rope_type"])](config, torch.device("cpu"))
        more = {k: scaling[k] for k in ("low_freq_factor", "high_freq_factor") if k in scaling}
        context = scaling.get("original_max_position_embeddings", 4096)
        spec = RopeSpec(dim, theta, "half", RopeScaling(scaling["rope_type"], scaling["factor"], context, **more))
    freq, magnitude = _frequencies(spec, None)
    assert freq.dtype is torch.float64
    torch.testing.assert_close(freq, theirs.double(), rtol=1e-6, atol=0)
    assert magnitude == pytest.approx(factor)


@pytest.mark.parametrize("sinks", [False, True])
def test_attention_is_a_softmax_over_what_came_before_and_the_sink(sinks: bool) -> None:
    q, k, v, sink = random(5, 4, 3), random(5, 2, 3), random(5, 2, 2), random(4)
    scores = torch.einsum("thd,shd->hts", q, k.repeat_interleave(2, 1)) * 0.3
    scores = scores.masked_fill(torch.ones(5, 5).triu(1).bool(), -torch.inf)
    if sinks:
        scores = torch.cat((scores, sink[:, None, None].expand(-1, 5, 1)), -1)
    weight = scores.softmax(-1)[..., :5]
    expected = torch.einsum("hts,shv->thv", weight, v.repeat_interleave(2, 1))
    same(causal(q, k, v, 0.3, sinks=sink if sinks else None), expected)


@pytest.mark.parametrize("on_logits", [False, True])
def test_a_router_takes_the_largest(on_logits: bool) -> None:
    spec = RouterSpec(HIDDEN, 5, 2, "F32", on_logits=on_logits, renormalise=not on_logits)
    x, w = random(7, HIDDEN), {"weight": random(5, HIDDEN)}
    logits = x @ w["weight"].T
    best, ids = logits.topk(3)
    got, weights, margin = router(spec, w, x, EXACT)
    assert torch.equal(got, ids[:, :2])
    same(weights, best[:, :2].softmax(-1))
    shown = best if on_logits else logits.softmax(-1).gather(1, ids)
    same(margin, shown[:, 1] - shown[:, 2])


def test_experts_are_weighted_mlps_and_absent_ones_add_nothing() -> None:
    spec = ExpertsSpec(HIDDEN, 4, 3, 2, "silu", "F32", "F32", "F32")
    w = {"gate": random(3, 4, HIDDEN), "up": random(3, 4, HIDDEN) * 2, "down": random(3, HIDDEN, 4)}
    x, ids, weights = random(2, HIDDEN), torch.tensor([[0, 2], [1, -1]]), random(2, 2)
    y = [(F.silu(x @ w["gate"][e].T) * (x @ w["up"][e].T)) @ w["down"][e].T for e in range(3)]
    expected = torch.stack((y[0][0] * weights[0, 0] + y[2][0] * weights[0, 1], y[1][1] * weights[1, 0]))
    same(experts(spec, w, x, ids, weights, EXACT), expected)


def test_drawn_up_projections_have_their_shapes_and_keep_a_latents_size() -> None:
    spec = specs.mla(4, "F32", latent=64)
    rows = spec.nope_dim + spec.value_dim
    assert list(_own(spec)) == [("kv_b", (4 * rows, 64), "F32", 0.0, 1 / 8)]
    assert [wanted[:2] for wanted in _own(replace(spec, split_kv_b=True))] == [
        ("k_b", (4, 64, spec.nope_dim)),
        ("v_b", (4, spec.value_dim, 64)),
    ]


def test_drawn_rates_are_negative_or_logarithms_and_a_norm_is_there_where_it_is_asked_for() -> None:
    shape = {"key_heads": 2, "value_heads": 4, "dim": 32, "fmt": "F32"}
    drawn = {role: (size, mean, std) for role, size, _, mean, std in _own(specs.delta_net(**shape))}  # type: ignore[arg-type]
    assert drawn["decay"] == ((4,), -1.0, 0.3)
    logs = {role: (mean, std) for role, _, _, mean, std in _own(specs.delta_net(**shape, decay_log=True))}  # type: ignore[arg-type]
    assert logs["decay"] == (0.0, 0.8)
    assert specs.delta_net(**shape).norm is not None  # type: ignore[arg-type]
    assert specs.delta_net(**shape, normed=False).norm is None  # type: ignore[arg-type]


def context() -> Context:
    return Context(Case("L2.x.y", 2, "x", "z", lambda ctx: None), plain_target(), 0)


def test_what_is_near_enough_passes_and_the_error_is_kept() -> None:
    truth = torch.tensor([1.0, -2.0], dtype=torch.float64)
    exact, ctx = truth.float(), context()
    compare(ctx, exact, truth, exact)
    assert ctx.values == {"error": 0.0}
    compare(ctx, torch.empty(0), torch.empty(0, dtype=torch.float64), torch.empty(0))
    for wrong, words in (
        (exact * 1.01, "too inexact"),
        (exact * torch.inf, "not finite"),
        (exact[:1], r"shape \[1\], not \[2\]"),
        (exact.double(), "not float32"),
    ):
        with pytest.raises(Failure, match=words):
            compare(context(), wrong, truth, exact)


def test_no_number_equals_itself_bit_by_bit() -> None:
    x = torch.tensor([1.0, torch.nan])
    same_bits(context(), x, x.clone(), "twice")
    with pytest.raises(Failure, match="twice: 1 of 2 values differ"):
        same_bits(context(), x, torch.tensor([2.0, torch.nan]), "twice")
