"""Residual streams: N copies of the residual that branches read a mixture of, by hyper-connections or gates.

Hyper-connections: Zhu et al., arXiv 2409.19606; with the mixing kept doubly stochastic, Xie et al., arXiv 2512.24880
(DeepSeek-V4, GLM-5.3-Flash). Gated streams are Qwen3.8-Flash-Next's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from ktcore.ops.base import Spec
from ktcore.ops.linear import LinearSpec
from ktcore.ops.norm import RMSNormSpec


@dataclass(frozen=True)
class HyperConnectionSpec(Spec):
    """What a branch reads of N streams, and how its result gets into them; X is float32 [T, N * hidden], one by one.

    With z = fn x, x = X / sqrt(mean(X^2) + rms_eps) over all N * hidden values of a token, and the rows of z, base and
    scale one part after another (N, N and N * N of them, one scale a part):
        pre  = sigmoid(z_pre * scale_0 + base_pre) + eps
        post = 2 sigmoid(z_post * scale_1 + base_post)
        M    = softmax over the last axis of (z_mix * scale_2 + base_mix) [N, N], + eps, then `rounds` times made
               doubly stochastic: M / (row sums + eps), left out the first time, then M / (column sums + eps)
    Weights of its own: `fn` [rows, N * hidden], `base` [rows], `scale` [parts].

    Module: `enter(X) -> x [T, hidden], carry`, x = sum_i pre_i X_i; `leave(X, y [T, hidden], carry) -> X`, with
    X_k = post_k y + sum_j M[j, k] X_j. The carry is the module's own affair; it holds what `leave` needs of the same X.

    Attributes:
        leave: "mixed", as above; "" for the end of a model: pre alone, and no `leave`.
        rounds: of normalisation, the softmax counted as the first one's rows.
        eps: as above; rms_eps: of the root.
    """

    op: ClassVar[str] = "hyper_connection"
    hidden: int
    streams: int
    eps: float
    rms_eps: float
    rounds: int
    leave: Literal["mixed", ""] = "mixed"
    fn_format: str = "F32"
    base_format: str = "F32"
    scale_format: str = "F32"

    @property
    def rows(self) -> int:
        """Of `fn` and `base`."""
        return self.streams * (2 + self.streams) if self.leave else self.streams

    @property
    def parts(self) -> int:
        """Of the rows, each with a scale."""
        return 3 if self.leave else 1


@dataclass(frozen=True)
class GatedStreamsSpec(Spec):
    """The same for gated streams (`Qwen4ExpTextGatedResidual` of transformers 5.24).

    With n = each stream divided by its own root mean square, times (weight + norm_offset), [N, hidden]:
        mix = sigmoid(up(silu(down(n) / N)))  [N, hidden];     x = mean_b(mix_b * n_b)
        inj = 2 sigmoid(inject(n) / N)  [N];                   X_b = X_b + inj_b y
    Weight of its own: `norm` [N * hidden]. Module: as that of `HyperConnectionSpec`.

    Attributes:
        eps: of the norm.
        down, up: [rank, N * hidden] and [N * hidden, rank].
        inject: [N, N * hidden]; None for the end of a model, which has no `leave`.
    """

    op: ClassVar[str] = "gated_streams"
    hidden: int
    streams: int
    eps: float
    down: LinearSpec
    up: LinearSpec
    inject: LinearSpec | None = None
    norm_offset: float = 0.0
    norm_format: str = "F32"


@dataclass(frozen=True)
class StreamBranchSpec(Spec):
    """A branch between residual streams. Call: X float32 [T, N * hidden], and what the branch takes besides -> X.

    x, carry = mix.enter(X); X = mix.leave(X, branch(x, …), carry).

    Attributes:
        mix: a `HyperConnectionSpec` or `GatedStreamsSpec` with a `leave`.
        branch: attention, MLP, mixture of experts …; it has its own norm, and no residual.
    """

    op: ClassVar[str] = "stream_branch"
    mix: Spec
    branch: Spec

    def __post_init__(self) -> None:
        if getattr(self.branch, "residual", False) or getattr(self.branch, "early_router", False):
            raise ValueError(
                f"{self.branch.op} between streams adds no residual of its own, and reads no layer's input"
            )


@dataclass(frozen=True)
class StreamEndSpec(Spec):
    """The end of a model with residual streams: X float32 [T, N * hidden] -> what the head reads, [T, hidden].

    Attributes:
        mix: whose `enter` makes one of the streams; None: their mean.
        norm: of the result; None for none.
    """

    op: ClassVar[str] = "stream_end"
    hidden: int
    streams: int
    mix: Spec | None = None
    norm: RMSNormSpec | None = None


def connection_weights(
    spec: HyperConnectionSpec, x: torch.Tensor, fn: torch.Tensor, base: torch.Tensor, scale: torch.Tensor
) -> tuple[torch.Tensor, ...]:
    """pre [T, N], and where the spec has a `leave` also post [T, N] and M [T, N, N], of streams x [T, N * hidden]."""
    n = spec.streams
    normed = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + spec.rms_eps)
    z = normed @ fn.T
    pre = torch.sigmoid(z[:, :n] * scale[0] + base[:n]) + spec.eps
    if not spec.leave:
        return (pre,)
    post = 2 * torch.sigmoid(z[:, n : 2 * n] * scale[1] + base[n : 2 * n])
    mix = (z[:, 2 * n :] * scale[2] + base[2 * n :]).view(-1, n, n)
    return pre, post, doubly_stochastic(torch.softmax(mix, -1) + spec.eps, spec.rounds, spec.eps)


def doubly_stochastic(mix: torch.Tensor, rounds: int, eps: float) -> torch.Tensor:
    """`rounds` of Sinkhorn and Knopp's normalisation of [..., N, N] whose rows sum to about 1 already."""
    for i in range(rounds):
        if i:
            mix = mix / (mix.sum(-1, keepdim=True) + eps)
        mix = mix / (mix.sum(-2, keepdim=True) + eps)
    return mix


def entered(x: torch.Tensor, pre: torch.Tensor) -> torch.Tensor:
    """sum_i pre_i X_i [T, hidden] of streams x [T, N * hidden]."""
    return (pre[..., None] * x.view(*pre.shape, -1)).sum(1)


def left(x: torch.Tensor, y: torch.Tensor, post: torch.Tensor, mix: torch.Tensor) -> torch.Tensor:
    """Streams [T, N * hidden] after a branch gave y [T, hidden]: X_k = post_k y + sum_j M[j, k] X_j."""
    mixed = mix.transpose(1, 2) @ x.view(*post.shape, -1)
    return (mixed + post[..., None] * y[:, None]).flatten(1)


def stream_norm(x: torch.Tensor, weight: torch.Tensor, streams: int, eps: float) -> torch.Tensor:
    """Each of the streams of x [T, N * hidden] divided by its own root mean square, times weight [N * hidden]."""
    apart = x.view(len(x), streams, -1)
    return (apart * torch.rsqrt(apart.pow(2).mean(-1, keepdim=True) + eps)).flatten(1) * weight
