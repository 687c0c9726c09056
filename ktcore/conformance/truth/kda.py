"""Truth of Kimi delta attention: a whole sequence, token by token, by the formulas of the paper (arXiv 2510.26692)."""

from __future__ import annotations

import torch

from ktcore.conformance.truth.arithmetic import Arithmetic
from ktcore.conformance.truth.delta_net import convolved, unit
from ktcore.conformance.truth.small import Values, linear, rms_norm
from ktcore.ops import KimiDeltaSpec


def kimi_delta(spec: KimiDeltaSpec, w: Values, x: torch.Tensor, a: Arithmetic) -> torch.Tensor:
    """A sequence x [L, hidden] from its beginning -> [L, hidden]."""
    n = rms_norm(spec.norm, w, x, a, "norm.") if spec.norm else a.cast(x)
    rows = {"q": spec.q, "k": spec.k, "v": spec.v}
    mixed = {role: convolved(linear(rows[role], w, n, a, f"{role}."), a.cast(w[f"conv_{role}"])) for role in rows}
    q, k, v = (mixed[role].reshape(-1, spec.heads, spec.head_dim) for role in "qkv")
    strength = _sigmoid(linear(spec.b, w, n, a, "b."))
    keep = _kept(spec, w, linear(spec.f_b, w, linear(spec.f_a, w, n, a, "f_a."), a, "f_b."), a)
    heads = range(spec.heads)
    out = torch.stack([_head(unit(q[:, h]), unit(k[:, h]), v[:, h], keep[:, h], strength[:, h]) for h in heads], 1)
    gate = _sigmoid(linear(spec.g_b, w, linear(spec.g_a, w, n, a, "g_a."), a, "g_b."))
    y = linear(spec.o, w, rms_norm(spec.out_norm, w, out, a, "out_norm.").flatten(1) * gate, a, "o.")
    return a.cast(x) + y if spec.residual else y


def _kept(spec: KimiDeltaSpec, w: Values, f: torch.Tensor, a: Arithmetic) -> torch.Tensor:
    """What is left of each channel of the state after each token, [L, heads, d]."""
    rate = torch.exp(a.cast(w["decay"])) if spec.decay_log else -a.cast(w["decay"])
    f = (f + a.cast(w["dt_bias"])).reshape(-1, spec.heads, spec.head_dim)
    if spec.lower_bound is not None:
        return torch.exp(spec.lower_bound * _sigmoid(rate[:, None] * f))
    # log(1 + e^f) without overflow
    return torch.exp(-rate[:, None] * torch.logaddexp(f, torch.zeros((), dtype=a.compute)))


def _sigmoid(x: torch.Tensor) -> torch.Tensor:
    return 1 / (1 + torch.exp(-x))


def _head(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, keep: torch.Tensor, strength: torch.Tensor
) -> torch.Tensor:
    """One head [L, d]: S_t = (I - strength_t k_t k_t^T) diag(keep_t) S_(t-1) + strength_t k_t v_t^T."""
    state, out = torch.zeros(k.shape[1], v.shape[1], dtype=v.dtype), []
    for t in range(len(q)):
        state = torch.diag(keep[t]) @ state
        state = state - strength[t] * torch.outer(k[t], k[t] @ state) + strength[t] * torch.outer(k[t], v[t])
        out.append((q[t] * q.shape[1] ** -0.5) @ state)
    return torch.stack(out)
