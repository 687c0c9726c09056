"""Truth of residual streams: hyper-connections token by token, gated streams by their formulas."""

from __future__ import annotations

import torch

from ktcore.conformance.truth.arithmetic import Arithmetic
from ktcore.conformance.truth.small import Values, linear, mlp, rms_norm
from ktcore.ops import GatedStreamsSpec, HyperConnectionSpec, MLPSpec, StreamBranchSpec, StreamEndSpec

Into = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
"""What a branch reads [T, hidden], how much of its result each stream takes [T, N], what each has of each [T, N, N]."""


def stream_branch(spec: StreamBranchSpec, w: Values, x: torch.Tensor, a: Arithmetic) -> torch.Tensor:
    """x [T, N * hidden] around an MLP -> the same shape."""
    assert isinstance(spec.branch, MLPSpec)
    inside, post, mix = _enter(spec.mix, w, x, a, "mix.")
    return _leave(a.cast(x), mlp(spec.branch, w, inside, a, "branch."), post, mix)


def streams_after(
    spec: object, w: Values, x: torch.Tensor, y: torch.Tensor, a: Arithmetic
) -> tuple[torch.Tensor, torch.Tensor]:
    """What a branch reads of x [T, N * hidden], [T, hidden], and the streams after it gave y."""
    inside, post, mix = _enter(spec, w, x, a, "")
    return inside, _leave(a.cast(x), a.cast(y), post, mix)


def _leave(x: torch.Tensor, y: torch.Tensor, post: torch.Tensor, mix: torch.Tensor) -> torch.Tensor:
    n = post.shape[1]
    apart = x.view(len(x), n, -1)
    after = [post[:, k, None] * y + sum(mix[:, j, k, None] * apart[:, j] for j in range(n)) for k in range(n)]
    return torch.stack(after, 1).flatten(1)


def stream_end(spec: StreamEndSpec, w: Values, x: torch.Tensor, a: Arithmetic) -> torch.Tensor:
    """x [T, N * hidden] -> [T, hidden]."""
    if spec.mix:
        one = _enter(spec.mix, w, x, a, "mix.")[0]
    else:
        one = a.cast(x).view(len(x), spec.streams, -1).sum(1) / spec.streams
    return rms_norm(spec.norm, w, one, a, "norm.") if spec.norm else one


def _enter(spec: object, w: Values, x: torch.Tensor, a: Arithmetic, prefix: str) -> Into:
    if isinstance(spec, HyperConnectionSpec):
        return _hyper(spec, w, x, a, prefix)
    assert isinstance(spec, GatedStreamsSpec)
    return _gated(spec, w, x, a, prefix)


def _hyper(spec: HyperConnectionSpec, w: Values, x: torch.Tensor, a: Arithmetic, prefix: str) -> Into:
    n = spec.streams
    x = a.cast(x)
    unit = x / torch.sqrt((x * x).sum(-1, keepdim=True) / x.shape[1] + spec.rms_eps)
    z = unit @ a.cast(w[f"{prefix}fn"]).T
    base, scale = a.cast(w[f"{prefix}base"]), a.cast(w[f"{prefix}scale"])
    pre = _sigmoid(z[:, :n] * scale[0] + base[:n]) + spec.eps
    inside = sum(pre[:, i, None] * x[:, i * spec.hidden : (i + 1) * spec.hidden] for i in range(n))
    assert isinstance(inside, torch.Tensor)
    if not spec.leave:
        return inside, pre, pre
    post = 2 * _sigmoid(z[:, n : 2 * n] * scale[1] + base[n : 2 * n])
    rows = torch.exp((z[:, 2 * n :] * scale[2] + base[2 * n :]).view(-1, n, n))
    mix = rows / rows.sum(2, keepdim=True) + spec.eps
    for turn in range(2 * spec.rounds - 1):
        # columns first, for the softmax has made rows of sum one
        mix = mix / (mix.sum(1 + turn % 2, keepdim=True) + spec.eps)
    return inside, post, mix


def _gated(spec: GatedStreamsSpec, w: Values, x: torch.Tensor, a: Arithmetic, prefix: str) -> Into:
    n = spec.streams
    x = a.cast(x)
    apart = x.view(len(x), n, spec.hidden)
    square = (apart * apart).sum(-1, keepdim=True) / spec.hidden
    unit = (apart / torch.sqrt(square + spec.eps)).flatten(1) * (a.cast(w[f"{prefix}norm"]) + spec.norm_offset)
    low = linear(spec.down, w, unit, a, f"{prefix}down.") / n
    mix = _sigmoid(linear(spec.up, w, low * _sigmoid(low), a, f"{prefix}up."))
    inside = (mix * unit).view(len(x), n, -1).sum(1) / n
    same = torch.eye(n, dtype=x.dtype).expand(len(x), n, n)
    if spec.inject is None:
        return inside, same, same
    return inside, 2 * _sigmoid(linear(spec.inject, w, unit, a, f"{prefix}inject.") / n), same


def _sigmoid(x: torch.Tensor) -> torch.Tensor:
    return 1 / (1 + torch.exp(-x))
