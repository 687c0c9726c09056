"""Gated delta net (Yang et al., arXiv 2412.06464) as a residual branch (Qwen3-Next, 3.5): attention by a state."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from ktcore.ops.base import Spec
from ktcore.ops.linear import LinearSpec
from ktcore.ops.norm import RMSNormSpec

L2_EPS = 1e-6
CHUNK = 64


@dataclass(frozen=True)
class StateCacheSpec(Spec):
    """One layer's recurrent states, a slot a sequence, beside the paged KV cache of other layers.

    `read(step) -> one float32 [n, *shape] a shape`: the states before the step, zero for sequences that begin with it
    (`StepBatch.starts`), whatever their slot holds. `write(step, *states)`: those after it. `step.state_slots` says
    which slots; slots need no clearing. `copy_states(source, target)` copies slots: a slot that no running sequence
    has can keep the states at a page's border, for a later sequence with the same prefix.

    Attributes:
        shapes: of the states that a sequence has in this layer.
    """

    op: ClassVar[str] = "state_cache"
    shapes: tuple[tuple[int, ...], ...]

    @property
    def values(self) -> int:
        """Values a slot holds."""
        return sum(torch.Size(shape).numel() for shape in self.shapes)


@dataclass(frozen=True)
class GatedDeltaNetSpec(Spec):
    """Call: x float32 [T, hidden], step -> [T, hidden].

    With n = norm(x), C = 2 * key_heads * key_dim + value_heads * value_dim, and per token:
        q, k, v = silu(conv(qkv(n))): a causal depthwise convolution over the last conv_width tokens, no bias
        q, k = q / |q| / sqrt(key_dim), k / |k| a head; key head j serves value heads j * r .. j * r + r - 1
        beta = sigmoid(b(n)), g = decay * softplus(a(n) + dt_bias), both [value_heads]
        S <- e^g S;  u = beta (v - S^T k);  S <- S + k u^T;  out = S^T q      a value head, S [key_dim, value_dim]
        y = x + o(out_norm(out) * silu(z(n)))
    Weights of its own: `conv` [C, conv_width], the oldest token's factor first; `decay` [value_heads], the negative
    rates, or with `decay_log` their negated logarithms (decay = -exp(A_log)); `dt_bias` [value_heads].

    Attributes:
        qkv: [C, hidden], rows of q of all heads, then of k, then of v.
        z, b, a: [value_heads * value_dim, hidden] and twice [value_heads, hidden].
        out_norm: over value_dim, one weight for all heads.
        state: shapes ((conv_width - 1, C), (value_heads, key_dim, value_dim)): the last inputs of the convolution,
            oldest first, and S.
        tiled: value head i has key head i mod key_heads instead (GGUF files of Qwen3.5).
        sigmoid_gate: sigmoid stands for silu in y (Qwen3.8-Flash-Next).
    """

    op: ClassVar[str] = "gated_delta_net"
    hidden: int
    key_heads: int
    value_heads: int
    key_dim: int
    value_dim: int
    conv_width: int
    qkv: LinearSpec
    z: LinearSpec
    b: LinearSpec
    a: LinearSpec
    o: LinearSpec
    out_norm: RMSNormSpec
    state: StateCacheSpec
    conv_format: str
    decay_format: str = "F32"
    dt_bias_format: str = "F32"
    decay_log: bool = False
    tiled: bool = False
    norm: RMSNormSpec | None = None
    residual: bool = True
    sigmoid_gate: bool = False


def causal_conv(x: torch.Tensor, before: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """silu of the depthwise convolution of x [T, C] with weight [C, width].

    Args:
        before: [width - 1, C], the inputs before x; zeros where a sequence begins.

    Returns:
        [T, C], and the last width - 1 inputs, which the next call takes as `before`.
    """
    inputs = torch.cat((before, x))
    windows = inputs.unfold(0, weight.shape[1], 1)  # [T, C, width]
    return torch.nn.functional.silu((windows * weight).sum(-1)), inputs[len(x) :]


def delta_rule(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, g: torch.Tensor, beta: torch.Tensor, state: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The recurrence of `GatedDeltaNetSpec`, token by token.

    Args:
        q, k: [T, heads, key_dim], normalised and scaled; v: [T, heads, value_dim].
        g, beta: [T, heads]; state: [heads, key_dim, value_dim].

    Returns:
        [T, heads, value_dim] and the state after the last token.
    """
    out = torch.empty_like(v)
    for t in range(len(q)):
        state = state * g[t].exp()[:, None, None]
        u = beta[t, :, None] * (v[t] - torch.einsum("hkv,hk->hv", state, k[t]))
        state = state + k[t, :, :, None] * u[:, None, :]
        out[t] = torch.einsum("hkv,hk->hv", state, q[t])
    return out, state


def delta_rule_chunked(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    state: torch.Tensor,
    chunk: int = CHUNK,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`delta_rule` by matrix products over chunks of tokens; arguments and result are the same.

    Within a chunk, with G_t the sum of g up to t, the u_t solve (I + L) U = beta (V - e^G K S0), where L is strictly
    lower triangular, L_tj = beta_t e^(G_t - G_j) k_t.k_j.
    """
    out = torch.empty_like(v)
    for start in range(0, len(q), chunk):
        at = slice(start, start + chunk)
        qc, kc, vc, bc = (t[at].transpose(0, 1) for t in (q, k, v, beta[..., None]))  # [heads, C, ...]
        total = g[at].double().cumsum(0).T  # [heads, C]; differences of long sums, so float32 would not do
        fade = (total[:, :, None] - total[:, None, :]).tril().exp().tril().to(g.dtype)
        grown = total.exp()[..., None].to(g.dtype)
        system = (bc * (kc @ kc.transpose(1, 2)) * fade).tril(-1)
        u = torch.linalg.solve_triangular(system, bc * (vc - grown * (kc @ state)), upper=False, unitriangular=True)
        out[at] = (grown * (qc @ state) + ((qc @ kc.transpose(1, 2)) * fade) @ u).transpose(0, 1)
        left = (total[:, -1:] - total).exp()[..., None].to(g.dtype)
        state = state * grown[:, -1:] + (kc * left).transpose(1, 2) @ u
    return out, state


def for_value_heads(x: torch.Tensor, value_heads: int, tiled: bool) -> torch.Tensor:
    """Queries or keys [T, key_heads, d] of every value head, [T, value_heads, d]; `tiled` as in `GatedDeltaNetSpec`."""
    times = value_heads // x.shape[1]
    return x.repeat(1, times, 1) if tiled else x.repeat_interleave(times, 1)


def l2_normalised(x: torch.Tensor) -> torch.Tensor:
    """x / sqrt(sum(x^2, -1) + 1e-6)."""
    return x * torch.rsqrt(x.pow(2).sum(-1, keepdim=True) + L2_EPS)
