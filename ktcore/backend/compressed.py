"""Attention over a window and compressed entries, composed of its parts, whoever made those."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, cast

import torch

from ktcore.backend.branches import step_positions
from ktcore.backend.implementation import LoadRequest
from ktcore.backend.runtime import DeviceRuntime
from ktcore.ops.batch import StepBatch
from ktcore.ops.compressed import (
    CompressedAttentionSpec,
    EntryCacheSpec,
    EntryIndexerSpec,
    merged,
    mirrored_pairs,
    rotated_last,
)
from ktcore.ops.norm import rms_norm

COMPRESSED = frozenset({"pool_values", "pool_gates", "pool_norm", "entries", "indexer", "norm", "residual"})
"""What an implementation handles that loads `compressed_branch`."""


def compressed_branch(
    request: LoadRequest, o_a: torch.Tensor, sinks: torch.Tensor, ape: torch.Tensor | None
) -> Callable[..., torch.Tensor]:
    """x float32 [T, hidden], step -> [T, hidden], as `CompressedAttentionSpec` says.

    Args:
        o_a, sinks, ape: on the device; o_a of any float type, which its products are made in.
    """
    spec, parts, runtime = cast(CompressedAttentionSpec, request.spec), request.children, request.runtime
    turn, by_group = spec.rope.dim, o_a.transpose(1, 2).contiguous()

    def run(x: torch.Tensor, step: StepBatch) -> torch.Tensor:
        tokens = x.shape[0]
        positions = step_positions(runtime, step)

        def rotate(part: torch.Tensor) -> torch.Tensor:
            return cast(torch.Tensor, parts["rope"](part, positions))

        n = parts["norm"](x) if spec.norm else x
        low = parts["q_a_norm"](parts["q_a"](n))
        q = rms_norm(parts["q_b"](low).view(tokens, spec.heads, spec.head_dim), None, spec.q_eps)
        q = rotated_last(q, turn, rotate)
        k = rotated_last(parts["kv_norm"](parts["kv"](n))[:, None, :], turn, rotate)[:, 0]
        seen = [parts["window"].attend(step, q, k, spec.scale)]
        if spec.entries and ape is not None:
            store_entries(parts, spec.entries, ape, n, step, runtime, turn)
            more = {"chosen": parts["indexer"](n, low, step)} if spec.indexer else {}
            seen.append(parts["entries"].attend(step, q, spec.scale, **more))
        o = rotated_last(merged(tuple(seen), sinks), turn, lambda t: _back(t, rotate, spec))
        grouped = o.reshape(tokens, spec.groups, -1).transpose(0, 1).to(by_group.dtype)
        y = parts["o_b"](torch.bmm(grouped, by_group).float().transpose(0, 1).reshape(tokens, -1))
        return cast(torch.Tensor, x + y if spec.residual else y)

    return run


def entry_indexer_branch(request: LoadRequest, ape: torch.Tensor) -> Callable[..., torch.Tensor]:
    """n float32 [T, hidden], low float32 [T, rank], step -> int32 [T, top_k], as `EntryIndexerSpec` says.

    Args:
        ape: float32 [ratio, width] on the device.
    """
    spec, parts, runtime = cast(EntryIndexerSpec, request.spec), request.children, request.runtime

    def run(n: torch.Tensor, low: torch.Tensor, step: StepBatch) -> torch.Tensor:
        store_entries(parts, spec.entries, ape, n, step, runtime, spec.rope.dim)
        positions = step_positions(runtime, step)
        q = parts["q"](low).view(-1, spec.heads, spec.head_dim)
        q = rotated_last(q, spec.rope.dim, lambda part: parts["rope"](part, positions))
        return cast(torch.Tensor, parts["entries"].choose(step, q, parts["weights"](n) * spec.scale))

    return run


def store_entries(
    parts: Mapping[str, Any],
    spec: EntryCacheSpec,
    ape: torch.Tensor,
    n: torch.Tensor,
    step: StepBatch,
    runtime: DeviceRuntime,
    turn: int,
) -> None:
    """Pool what closes in the step, norm and rotate it, and store it in `parts["entries"]`.

    Args:
        parts: with pool_values, pool_gates, pool_norm, rope and entries.
        n: normed input [T, hidden].
        turn: how many of an entry's last values rotate.
    """
    gates = parts["pool_gates"](n) + ape[step_positions(runtime, step) % spec.ratio]
    pooled, positions = parts["entries"].pool(step, parts["pool_values"](n), gates)
    made = parts["pool_norm"](pooled)[:, None, :]
    made = rotated_last(made, turn, lambda part: parts["rope"](part, positions))
    parts["entries"].append(step, made[:, 0])


def _back(
    x: torch.Tensor, rotate: Callable[[torch.Tensor], torch.Tensor], spec: CompressedAttentionSpec
) -> torch.Tensor:
    """x rotated by the negative angle."""
    return mirrored_pairs(rotate(mirrored_pairs(x, spec.rope.pairing)), spec.rope.pairing)
