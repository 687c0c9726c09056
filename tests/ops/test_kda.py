"""Kimi delta attention against transformers' functions and classes of Kimi Linear and GLM-5.3-Flash."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from transformers import Glm5NextTextConfig, KimiLinearConfig
from transformers.models.glm5_next.modeling_glm5_next import (
    Glm5NextTextForgetGate,
    chunk_kimi_delta_attention,
    recurrent_kimi_delta_attention,
)
from transformers.models.kimi_linear.modeling_kimi_linear import KimiLinearForgetGate

from ktcore.ops.kda import channel_decay, channel_rule, channel_rule_chunked
from ktcore.ops.linear_attention import l2_normalised

HEADS, KEY, VALUE = 5, 16, 24
Rule = Callable[..., tuple[torch.Tensor, torch.Tensor]]


def _inputs(tokens: int, kind: torch.dtype = torch.float32) -> SimpleNamespace:
    g = torch.Generator().manual_seed(tokens)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=g, dtype=kind)

    return SimpleNamespace(
        q=draw(tokens, HEADS, KEY),
        k=draw(tokens, HEADS, KEY),
        v=draw(tokens, HEADS, VALUE),
        # from almost no decay to the bound of -5 and beyond it, where e^-G of a chunk overflows
        g=-draw(tokens, HEADS, KEY).abs() * torch.tensor([0.01, 0.1, 1, 5, 40], dtype=kind)[:, None],
        beta=draw(tokens, HEADS).sigmoid(),
        state=draw(HEADS, KEY, VALUE),
    )


@pytest.mark.parametrize("rule", [channel_rule, channel_rule_chunked])
@pytest.mark.parametrize("tokens", [1, 5, 16, 150])
def test_both_forms_match_transformers(rule: Rule, tokens: int) -> None:
    i = _inputs(tokens)
    out, state = rule(l2_normalised(i.q) * KEY**-0.5, l2_normalised(i.k), i.v, i.g, i.beta, i.state)
    theirs = (i.q[None], i.k[None], i.v[None], i.g[None], i.beta[None])
    # transformers sums decays of a chunk in float32
    for function, within in ((recurrent_kimi_delta_attention, 1e-5), (chunk_kimi_delta_attention, 1e-4)):
        expected, last = function(
            *theirs, initial_state=i.state[None], output_final_state=True, use_qk_l2norm_in_kernel=True
        )
        torch.testing.assert_close(out, expected[0], atol=within, rtol=1e-4)
        torch.testing.assert_close(state, last[0], atol=within, rtol=1e-4)


@pytest.mark.parametrize("chunk", [3, 16, 64])
def test_chunks_are_the_recurrence(chunk: int) -> None:
    i = _inputs(100, torch.float64)
    given = (l2_normalised(i.q), l2_normalised(i.k), i.v, i.g, i.beta, i.state)
    for ours, wanted in zip(channel_rule_chunked(*given, chunk), channel_rule(*given), strict=True):
        torch.testing.assert_close(ours, wanted, atol=1e-12, rtol=1e-12)


def test_a_run_in_pieces_equals_the_run_at_once() -> None:
    i = _inputs(100, torch.float64)
    q, k = l2_normalised(i.q), l2_normalised(i.k)
    whole, last = channel_rule_chunked(q, k, i.v, i.g, i.beta, i.state)
    state, parts = i.state, []
    for at in (slice(0, 33), slice(33, 34), slice(34, 100)):
        part, state = channel_rule_chunked(q[at], k[at], i.v[at], i.g[at], i.beta[at], state)
        parts.append(part)
    torch.testing.assert_close(torch.cat(parts), whole, atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(state, last, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("bound", [None, -5.0])
def test_the_decay_is_that_of_transformers_classes(bound: float | None) -> None:
    sizes = {"hidden_size": 32, "linear_num_heads": HEADS, "linear_head_dim": KEY}
    torch.manual_seed(3)
    gates = [Glm5NextTextForgetGate(Glm5NextTextConfig(**sizes, linear_lower_bound=bound))]
    if bound is None:
        gates.append(KimiLinearForgetGate(KimiLinearConfig(**sizes)))
    for gate in gates:
        with torch.no_grad():
            for value in (gate.A_log, gate.dt_bias):
                value.copy_(torch.randn_like(value))
            x = 5 * torch.randn(1, 40, 32)
            f = (gate.f_b_proj(gate.f_a_proj(x))[0] + gate.dt_bias).view(40, HEADS, KEY)
            ours = channel_decay(f, -gate.A_log.flatten().exp(), bound)
            torch.testing.assert_close(ours, gate(x)[0], atol=1e-6, rtol=1e-5)
