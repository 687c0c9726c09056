"""Residual branches composed of their parts, whoever made those: attention, latent and sparse, MLP, mixture of experts,
and those between residual streams.

A backend that has no fused kernel for a branch loads it from here; what it computes itself it hands in.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch

from ktcore.backend.experts import submit_experts, wait_experts
from ktcore.backend.implementation import LoadRequest
from ktcore.backend.loading import on_device
from ktcore.backend.mirror import mirrored
from ktcore.backend.runtime import DeviceRuntime
from ktcore.ops.attention import AttentionSpec, gate_heads, tempered
from ktcore.ops.batch import StepBatch
from ktcore.ops.block_indexer import BlockIndexerSpec
from ktcore.ops.indexer import TokenIndexerSpec, layer_norm
from ktcore.ops.mla import MLASpec
from ktcore.ops.mlp import MLPSpec, clamped_glu, gated
from ktcore.ops.moe import MoESpec
from ktcore.ops.streams import StreamEndSpec

ATTENTION = frozenset(
    {
        "norm",
        "q_norm",
        "k_norm",
        "rope",
        "residual",
        "post_norm",
        "gate",
        "norm_after_rope",
        "norm_whole",
        "temperature",
        "temperature.offset",
        "indexer",
        "v_norm",
        "value_dim",
        "value_scale",
        "head_gate",
    }
)
"""What an implementation handles that loads `attention_branch`; with `sinks` handed in, those too."""
MLA = frozenset({"split_kv_b", "q", "q_a", "q_a_norm", "q_b", "norm", "residual"}) | {
    "temperature",
    "temperature.offset",
    "indexer",
    "shared_index",
    "rope",
}
"""What an implementation handles that loads `mla_branch` and attends with both stored forms of the up-projections, over
the tokens that `chosen_tokens` gives where there are such."""
INDEXER = frozenset({"rope"})
"""What an implementation handles that loads `indexer_branch`; with `ape` handed in, `gate` too."""
MLP = frozenset({"norm", "residual", "post_norm", "clamped", "clamped.plus", "clamped.after", "out_scale"})
"""What an implementation handles that loads `mlp_branch`."""
MOE = frozenset({"shared", "shared_gate", "norm", "residual", "early_router"}) | {
    "shared_apart",
    "router_norm",
    "routed_norm",
    "post_norm",
    "out_scale",
}
"""What an implementation handles that loads `moe_branch`."""

Attend = Callable[[StepBatch, torch.Tensor, torch.Tensor], torch.Tensor]
Gated = Callable[[torch.Tensor, torch.Tensor, str], torch.Tensor]


def step_positions(runtime: DeviceRuntime, step: StepBatch) -> torch.Tensor:
    """The step's positions int64 [T] on the runtime's device, copied once a step."""
    if runtime.device.type == "cpu":
        return step.positions
    return mirrored(runtime, step, "positions", lambda s: s.positions)


def step_ids(runtime: DeviceRuntime, step: StepBatch) -> torch.Tensor:
    """The step's token ids int64 [T], likewise."""
    if runtime.device.type == "cpu":
        return step.token_ids
    return mirrored(runtime, step, "token_ids", lambda s: s.token_ids)


def attention_branch(request: LoadRequest, sinks: torch.Tensor | None = None) -> Callable[..., torch.Tensor]:
    """x float32 [T, hidden], step -> [T, hidden], as `AttentionSpec` says.

    Args:
        sinks: [heads] on the device, where the spec has sinks.
    """
    spec, parts, runtime = cast(AttentionSpec, request.spec), request.children, request.runtime
    more = () if sinks is None else (sinks,)

    def normed(q: torch.Tensor, k: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if spec.norm_whole:
            return parts["q_norm"](q.flatten(1)).view(q.shape), parts["k_norm"](k.flatten(1)).view(k.shape)
        return parts["q_norm"](q) if spec.q_norm else q, parts["k_norm"](k) if spec.k_norm else k

    def run(x: torch.Tensor, step: StepBatch) -> torch.Tensor:
        n = parts["norm"](x) if spec.norm else x
        q = parts["q"](n).view(-1, spec.heads, spec.head_dim)
        k = parts["k"](n).view(-1, spec.kv_heads, spec.head_dim)
        v = parts["v"](n).view(-1, spec.kv_heads, spec.value_width)
        v = parts["v_norm"](v) if spec.v_norm else v
        v = v * spec.value_scale if spec.value_scale != 1.0 else v
        if not spec.norm_after_rope:
            q, k = normed(q, k)
        positions = step_positions(runtime, step)
        if spec.rope:
            q, k = parts["rope"](q, positions), parts["rope"](k, positions)
        if spec.norm_after_rope:
            q, k = normed(q, k)
        if spec.temperature:
            q = tempered(q, positions, spec.temperature)
        parts["cache"].append(step, k, v)
        chosen = {"chosen": parts["indexer"](n, step)} if spec.indexer else {}
        seen = parts["cache"].attend(step, q, spec.scale, *more, **chosen).reshape(x.shape[0], -1)
        y = parts["o"](gate_heads(seen, parts["gate"](n), spec) if spec.gate else seen)
        y = parts["post_norm"](y) if spec.post_norm else y
        return cast(torch.Tensor, x + y if spec.residual else y)

    return run


def mla_branch(request: LoadRequest, attend: Attend) -> Callable[..., torch.Tensor]:
    """x float32 [T, hidden], step -> [T, hidden], as `MLASpec` says.

    Args:
        attend: (step, q_nope [T, heads, N], q_rope [T, heads, R]) -> [T, heads, V], after the step's rows were stored.
    """
    spec, parts, runtime = cast(MLASpec, request.spec), request.children, request.runtime

    def run(x: torch.Tensor, step: StepBatch) -> torch.Tensor:
        n = parts["norm"](x) if spec.norm else x
        low = parts["q_a_norm"](parts["q_a"](n)) if spec.q_a else n
        q = parts["q_b" if spec.q_a else "q"](low).view(-1, spec.heads, spec.nope_dim + spec.rope_dim)
        q_nope, q_rope = q.split((spec.nope_dim, spec.rope_dim), -1)
        latent, k_rope = parts["kv_a"](n).split((spec.latent, spec.rope_dim), -1)
        positions = step_positions(runtime, step)
        if spec.rope:
            q_rope = parts["rope"](q_rope.contiguous(), positions)
            k_rope = parts["rope"](k_rope[:, None, :].contiguous(), positions)[:, 0]
        if spec.temperature:
            q_nope, q_rope = (tempered(part, positions, spec.temperature) for part in (q_nope, q_rope))
        parts["cache"].append(step, parts["kv_a_norm"](latent.contiguous()), k_rope)
        if spec.indexer:
            step.hand_on(parts["indexer"](n, low, step))
        y = parts["o"](attend(step, q_nope, q_rope).reshape(x.shape[0], -1))
        return cast(torch.Tensor, x + y if spec.residual else y)

    return run


def indexer_branch(
    request: LoadRequest, k_norm: torch.Tensor, k_norm_bias: torch.Tensor, ape: torch.Tensor | None = None
) -> Callable[..., torch.Tensor]:
    """n float32 [T, hidden], low float32 [T, rank], step -> int32 [T, width], as `TokenIndexerSpec` says.

    Args:
        k_norm, k_norm_bias: float32 [head_dim] on the device.
        ape: float32 [pool, head_dim] on the device, where keys are pooled.
    """
    spec, parts, runtime = cast(TokenIndexerSpec, request.spec), request.children, request.runtime

    def run(n: torch.Tensor, low: torch.Tensor, step: StepBatch) -> torch.Tensor:
        positions = step_positions(runtime, step)
        key = layer_norm(parts["k"](n), k_norm, k_norm_bias, spec.eps)
        q = parts["q"](low).view(-1, spec.heads, spec.head_dim)
        if spec.rope:
            q, key = parts["rope"](q, positions), parts["rope"](key[:, None, :], positions)[:, 0]
        more = () if ape is None else (parts["gate"](n) + ape[positions % spec.cache.pool],)
        parts["cache"].append(step, key, *more)
        return cast(torch.Tensor, parts["cache"].choose(step, q, parts["weights"](n) * spec.scale))

    return run


def block_indexer_branch(request: LoadRequest) -> Callable[..., torch.Tensor]:
    """n float32 [T, hidden], step -> the tokens that each one attends to, as `BlockIndexerSpec` says."""
    spec, parts, runtime = cast(BlockIndexerSpec, request.spec), request.children, request.runtime
    cache = parts["cache"]

    def run(n: torch.Tensor, step: StepBatch) -> torch.Tensor:
        positions = step_positions(runtime, step)
        q = parts["rope"](parts["q_norm"](parts["q"](n).view(-1, spec.heads, spec.head_dim)), positions)
        k = parts["k"](n)
        if spec.cache.pool == "mean":
            means = parts["k_norm"](cache.append(step, k))
            first = positions - positions % spec.cache.block
            cache.complete(step, parts["rope"](means[:, None, :], first)[:, 0])
        else:
            cache.append(step, parts["rope"](parts["k_norm"](k)[:, None, :], positions)[:, 0])
        return cast(torch.Tensor, cache.choose(step, q))

    return run


def chosen_tokens(spec: MLASpec, step: StepBatch, device: torch.device) -> dict[str, torch.Tensor]:
    """What `attend` of the branch's cache takes beside the queries: the tokens that were chosen, or nothing."""
    return {"chosen": step.handed_on().to(device)} if spec.indexer or spec.shared_index else {}


def mlp_branch(request: LoadRequest, gate: Gated = gated) -> Callable[[torch.Tensor], torch.Tensor]:
    """float32 [T, hidden] -> [T, hidden], as `MLPSpec` says.

    Args:
        gate: (gate, up, activation) -> act(gate) * up.
    """
    spec, parts = cast(MLPSpec, request.spec), request.children
    scale = on_device(request, "out_scale") if spec.out_scale else None

    def run(x: torch.Tensor) -> torch.Tensor:
        n = parts["norm"](x) if spec.norm else x
        g, u = parts["gate"](n), parts["up"](n)
        y = parts["down"](clamped_glu(g, u, spec.clamped) if spec.clamped else gate(g, u, spec.activation))
        y = parts["post_norm"](y) if spec.post_norm else y
        y = x + y if spec.residual else y
        return cast(torch.Tensor, y if scale is None else y * scale)

    return run


def moe_branch(request: LoadRequest) -> Callable[..., torch.Tensor]:
    """x float32 [T, hidden] (and what the router needs beside it) -> [T, hidden], as `MoESpec` says."""
    spec, parts = cast(MoESpec, request.spec), request.children
    scale = on_device(request, "out_scale") if spec.out_scale else None

    def run(x: torch.Tensor, more: Any = None) -> Any:
        n = parts["norm"](x) if spec.norm else x
        # experts on another device run beside the shared part
        read = more if spec.early_router else parts["router_norm"](x) if spec.router_norm else n
        told = (more,) if spec.router.by_token else ()
        ticket = submit_experts(parts["experts"], n, *parts["router"](read, *told))
        shared = parts["shared"](x if spec.shared_apart else n) if spec.shared else None
        if shared is not None and spec.shared_gate:
            shared = shared * torch.sigmoid(parts["shared_gate"](n))
        y = wait_experts(parts["experts"], ticket)
        y = parts["routed_norm"](y) if spec.routed_norm else y
        y = y if shared is None else y + shared
        y = parts["post_norm"](y) if spec.post_norm else y
        y = x + y if spec.residual else y
        return y if scale is None else y * scale

    return run


def stream_branch(request: LoadRequest) -> Callable[..., torch.Tensor]:
    """X float32 [T, N * hidden], and what the branch takes besides -> [T, N * hidden], as `StreamBranchSpec` says."""
    mix, branch = request.children["mix"], request.children["branch"]

    def run(x: torch.Tensor, *more: Any) -> torch.Tensor:
        entered, carry = mix.enter(x)
        return cast(torch.Tensor, mix.leave(x, branch(entered, *more), carry))

    return run


def stream_end(request: LoadRequest) -> Callable[[torch.Tensor], torch.Tensor]:
    """X float32 [T, N * hidden] -> [T, hidden], as `StreamEndSpec` says."""
    spec, parts = cast(StreamEndSpec, request.spec), request.children

    def run(x: torch.Tensor) -> torch.Tensor:
        one = parts["mix"].enter(x)[0] if spec.mix else x.view(-1, spec.streams, spec.hidden).mean(1)
        return cast(torch.Tensor, parts["norm"](one) if spec.norm else one)

    return run


class AbsorbedLatents:
    """What `mla_branch` attends with where keys are never expanded: (step, q_nope [T, heads, N], q_rope [T, heads, R])
    -> [T, heads, V].

    Args:
        compute: type that the up-projections are held and multiplied in.
    """

    def __init__(self, request: LoadRequest, compute: torch.dtype) -> None:
        s = self._spec = cast(MLASpec, request.spec)
        self._cache = request.children["cache"]
        self._compute = compute
        if s.split_kv_b:
            # stored transposed: k_b [heads, L, N], v_b [heads, V, L]
            self._k_up = on_device(request, "k_b", compute).transpose(1, 2).contiguous()
            self._v_up = on_device(request, "v_b", compute).transpose(1, 2).contiguous()
        else:
            up = on_device(request, "kv_b", compute).view(s.heads, s.nope_dim + s.value_dim, s.latent)
            self._k_up = up[:, : s.nope_dim].contiguous()
            self._v_up = up[:, s.nope_dim :].transpose(1, 2).contiguous()

    def __call__(self, step: StepBatch, q_nope: torch.Tensor, q_rope: torch.Tensor) -> torch.Tensor:
        # [heads, T, N] x [heads, N, L]: the query in latent space
        absorbed = torch.bmm(q_nope.transpose(0, 1).to(self._compute), self._k_up).transpose(0, 1)
        more = chosen_tokens(self._spec, step, q_rope.device)
        seen = self._cache.attend(step, torch.cat((absorbed.float(), q_rope), -1), self._spec.scale, **more)
        return torch.bmm(seen.transpose(0, 1).to(self._compute), self._v_up).transpose(0, 1).float()
