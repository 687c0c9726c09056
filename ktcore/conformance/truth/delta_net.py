"""Truth of the gated delta net: a whole sequence, token by token, by the formulas of the paper (arXiv 2412.06464)."""

from __future__ import annotations

import torch

from ktcore.conformance.truth.arithmetic import Arithmetic
from ktcore.conformance.truth.small import Values, linear, rms_norm
from ktcore.ops import GatedDeltaNetSpec


def delta_net(spec: GatedDeltaNetSpec, w: Values, x: torch.Tensor, a: Arithmetic) -> torch.Tensor:
    """A sequence x [L, hidden] from its beginning -> [L, hidden]."""
    n = rms_norm(spec.norm, w, x, a, "norm.") if spec.norm else a.cast(x)
    mixed = convolved(linear(spec.qkv, w, n, a, "qkv."), a.cast(w["conv"]))
    keys = spec.key_heads * spec.key_dim
    q, k = (unit(t.reshape(-1, spec.key_heads, spec.key_dim)) for t in (mixed[:, :keys], mixed[:, keys : 2 * keys]))
    v = mixed[:, 2 * keys :].reshape(-1, spec.value_heads, spec.value_dim)
    rate = -torch.exp(a.cast(w["decay"])) if spec.decay_log else a.cast(w["decay"])
    # log(1 + e^t) without overflow
    steps = torch.logaddexp(linear(spec.a, w, n, a, "a.") + a.cast(w["dt_bias"]), torch.zeros((), dtype=a.compute))
    keep = torch.exp(rate * steps)
    strength = 1 / (1 + torch.exp(-linear(spec.b, w, n, a, "b.")))
    out = torch.stack(
        [
            _head(q[:, j], k[:, j], v[:, h], keep[:, h], strength[:, h])
            for h, j in ((h, _key_head(spec, h)) for h in range(spec.value_heads))
        ], 1,
    )  # fmt: skip
    z = linear(spec.z, w, n, a, "z.")
    gate = (1 if spec.sigmoid_gate else z) / (1 + torch.exp(-z))
    gated = rms_norm(spec.out_norm, w, out, a, "out_norm.").flatten(1) * gate
    y = linear(spec.o, w, gated, a, "o.")
    return a.cast(x) + y if spec.residual else y


def _key_head(spec: GatedDeltaNetSpec, value_head: int) -> int:
    return value_head % spec.key_heads if spec.tiled else value_head * spec.key_heads // spec.value_heads


def convolved(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """silu of sum_j weight[:, j] x[t - width + 1 + j], zeros before the first token."""
    width = weight.shape[1]
    padded = torch.cat((torch.zeros(width - 1, x.shape[1], dtype=x.dtype), x))
    y = sum(padded[j : j + len(x)] * weight[:, j] for j in range(width))
    assert isinstance(y, torch.Tensor)
    return y / (1 + torch.exp(-y))


def unit(x: torch.Tensor) -> torch.Tensor:
    """x / sqrt(|x|^2 + 1e-6) over the last axis."""
    return x / torch.sqrt((x * x).sum(-1, keepdim=True) + 1e-6)


def _head(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, keep: torch.Tensor, strength: torch.Tensor
) -> torch.Tensor:
    """One value head [L, value_dim]: S_t = keep_t (I - strength_t k_t k_t^T) S_(t-1) + strength_t k_t v_t^T."""
    state, out = torch.zeros(k.shape[1], v.shape[1], dtype=v.dtype), []
    for t in range(len(q)):
        erased = torch.outer(k[t], k[t] @ state)
        state = keep[t] * (state - strength[t] * erased) + strength[t] * torch.outer(k[t], v[t])
        out.append((q[t] * q.shape[1] ** -0.5) @ state)
    return torch.stack(out)
