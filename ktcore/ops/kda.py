"""Kimi delta attention (Kimi Linear, arXiv 2510.26692) as a residual branch: a delta rule that decays by channel."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from ktcore.ops.base import Spec
from ktcore.ops.linear import LinearSpec
from ktcore.ops.linear_attention import StateCacheSpec
from ktcore.ops.norm import RMSNormSpec

CHUNK = 16
"""Tokens of a chunk: factors of decay are made a pair of tokens and channel."""


@dataclass(frozen=True)
class KimiDeltaSpec(Spec):
    """Call: x float32 [T, hidden], step -> [T, hidden].

    With n = norm(x), d = head_dim, C = heads * d, and per token:
        q, k, v = silu(conv(q(n))), silu(conv(k(n))), silu(conv(v(n))): causal depthwise convolutions over the last
            conv_width tokens, no bias
        q, k = q / |q| / sqrt(d), k / |k| a head
        f = f_b(f_a(n)) + dt_bias, beta = sigmoid(b(n)), [C] and [heads]
        g = decay * softplus(f), or with `lower_bound` g = lower_bound * sigmoid(-decay * f), a value a channel of k
        S <- diag(e^g) S;  u = beta (v - S^T k);  S <- S + k u^T;  out = S^T q      a head, S [d, d]
        y = x + o(out_norm(out) * sigmoid(g_b(g_a(n))))
    Weights of its own: `conv_q`, `conv_k`, `conv_v` [C, conv_width], the oldest token's factor first; `decay` [heads],
    the negative rates, or with `decay_log` their negated logarithms (decay = -exp(A_log)); `dt_bias` [C].

    Attributes:
        f_a, f_b, g_a, g_b: the low-rank projections of decay and output gate.
        out_norm: over head_dim, one weight for all heads.
        state: shapes ((conv_width - 1, 3 C), (heads, d, d)): the last inputs of the convolutions, oldest first, those
            of q, k and v beside each other, and S.
        lower_bound: negative, g lies between it and 0; None: g has no bound.
    """

    op: ClassVar[str] = "kimi_delta_attention"
    hidden: int
    heads: int
    head_dim: int
    conv_width: int
    q: LinearSpec
    k: LinearSpec
    v: LinearSpec
    f_a: LinearSpec
    f_b: LinearSpec
    b: LinearSpec
    g_a: LinearSpec
    g_b: LinearSpec
    o: LinearSpec
    out_norm: RMSNormSpec
    state: StateCacheSpec
    conv_format: str
    decay_format: str = "F32"
    dt_bias_format: str = "F32"
    decay_log: bool = False
    lower_bound: float | None = None
    norm: RMSNormSpec | None = None
    residual: bool = True


def channel_decay(f: torch.Tensor, decay: torch.Tensor, lower_bound: float | None) -> torch.Tensor:
    """g of `KimiDeltaSpec` from f [T, heads, d] (dt_bias in it) and the negative rates [heads]."""
    decay = decay[:, None]
    if lower_bound is None:
        return decay * torch.nn.functional.softplus(f)
    return lower_bound * torch.sigmoid(-decay * f)


def output_gate(x: torch.Tensor) -> torch.Tensor:
    """What the normed result is multiplied by: a sigmoid, where the gated delta net has silu."""
    return torch.sigmoid(x)


def channel_rule(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, g: torch.Tensor, beta: torch.Tensor, state: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The recurrence of `KimiDeltaSpec`, token by token.

    Args:
        q, k: [T, heads, key_dim], normalised and scaled; v: [T, heads, value_dim].
        g: [T, heads, key_dim]; beta: [T, heads]; state: [heads, key_dim, value_dim].

    Returns:
        [T, heads, value_dim] and the state after the last token.
    """
    out = torch.empty_like(v)
    for t in range(len(q)):
        state = state * g[t].exp()[..., None]
        u = beta[t, :, None] * (v[t] - torch.einsum("hkv,hk->hv", state, k[t]))
        state = state + k[t, :, :, None] * u[:, None, :]
        out[t] = torch.einsum("hkv,hk->hv", state, q[t])
    return out, state


def channel_rule_chunked(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    state: torch.Tensor,
    chunk: int = CHUNK,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`channel_rule` by matrix products over chunks of tokens; arguments and result are the same.

    Within a chunk, with G_t the sum of g up to t and D_tj = e^(G_t - G_j) a channel, the u_t solve
    (I + L) U = beta (V - (K e^G) S0), where L is strictly lower triangular, L_tj = beta_t sum_c k_t D_tj k_j. The
    differences are taken before they are raised: e^-G alone is beyond float32 after 17 tokens at g = -5.
    """
    out = torch.empty_like(v)
    for start in range(0, len(q), chunk):
        at = slice(start, start + chunk)
        qc, kc, vc, bc = (t[at].transpose(0, 1) for t in (q, k, v, beta[..., None]))  # [heads, C, ...]
        total = g[at].double().cumsum(0).transpose(0, 1)  # differences of long sums, so float32 would not do
        later = torch.ones(len(total[0]), len(total[0]), dtype=torch.bool, device=g.device).triu(1)
        fade = (total[:, :, None] - total[:, None]).masked_fill(later[..., None], float("-inf")).exp().to(g.dtype)
        grown = total.exp().to(g.dtype)
        system = (bc * torch.einsum("htc,htjc,hjc->htj", kc, fade, kc)).tril(-1)
        wanted = bc * (vc - (kc * grown) @ state)
        u = torch.linalg.solve_triangular(system, wanted, upper=False, unitriangular=True)
        among = torch.einsum("htc,htjc,hjc->htj", qc, fade, kc)
        out[at] = ((qc * grown) @ state + among @ u).transpose(0, 1)
        left = (total[:, -1:] - total).exp().to(g.dtype)
        state = state * grown[:, -1, :, None] + (kc * left).transpose(1, 2) @ u
    return out, state
