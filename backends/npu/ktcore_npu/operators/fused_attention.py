"""Calls of `npu_fused_infer_attention_score` over pages, and how its lists of lengths change in a captured graph.

The operator takes lengths as lists on the host, which a graph would bake in. So a capture records the call as a task
group behind an event of its own, and whoever fills the step's mirrors re-issues it with that step's lengths on another
stream (vllm-ascend `attention/attention_v1.py`, Ascend/pytorch's test of `graph_task_update_begin`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch

from ktcore.backend.mirror import Mirrors
from ktcore.backend.runtime import Stream
from ktcore.errors import BackendError
from ktcore.ops.batch import StepBatch
from ktcore_npu.runtime import NpuRuntime

Lengths = Callable[[StepBatch], tuple[list[int], list[int]]]
"""Of a step: where each request's queries end, and how many keys each request sees."""


def fused_attention(
    runtime: NpuRuntime, step: StepBatch, lengths: Lengths, query: torch.Tensor, **fixed: Any
) -> torch.Tensor:
    """Causal attention (`sparse_mode` 3: bottom right) of query [T, heads, D] in layout TND -> the shape of query.

    Args:
        fixed: key, value, block_table, block_size, num_heads, num_key_value_heads, scale, and of latent attention
            query_rope and key_rope. The scale has no sensible default (1.0), so it is always given.

    Raises:
        BackendError: the step is captured, and brings nothing that later steps could fill.
    """
    given = dict(
        query=query,
        atten_mask=runtime.causal_mask(),
        sparse_mode=3,
        input_layout="TND",
        **fixed,
    )
    ends, seen = lengths(step)
    operator = runtime.ops.npu_fused_infer_attention_score
    if not runtime.capturing:
        return cast(torch.Tensor, operator(**given, actual_seq_lengths=ends, actual_seq_lengths_kv=seen)[0])
    if not isinstance(step.mirrors, Mirrors):
        raise BackendError("attention in a graph needs a step with mirrors: its lengths change from step to step")
    out, lse = torch.empty_like(query), torch.empty(1, dtype=query.dtype, device=query.device)
    longest = [step.block_table.shape[1] * step.page_size] * len(seen)
    given.update(workspace=_workspace(runtime, step.mirrors, given, ends, longest), out=[out, lse])
    module, stream = runtime.module, runtime.module.current_stream()
    event = module.ExternalEvent()
    event.wait(stream)
    event.reset(stream)
    module.graph_task_group_begin(stream)
    operator.out(**given, actual_seq_lengths=ends, actual_seq_lengths_kv=seen)
    handle = module.graph_task_group_end(stream)

    def refill(now: StepBatch, _: Stream) -> None:
        ends, seen = lengths(now)
        update = runtime.update_stream
        with runtime.use_stream(update):
            module.graph_task_update_begin(update, handle)
            operator.out(**given, actual_seq_lengths=ends, actual_seq_lengths_kv=seen)
            module.graph_task_update_end(update)
            event.record(update)

    step.mirrors.at_fill(refill)
    return out


def _workspace(runtime: NpuRuntime, mirrors: Mirrors, given: dict[str, Any], ends: list[int], seen: list[int]) -> Any:
    """Scratch for the longest lengths; layers of a graph run one after another and share it."""
    shared = runtime.workspaces.setdefault(mirrors, {})
    shape = (*given["query"].shape, given["num_key_value_heads"])
    if shape not in shared:
        shared[shape] = runtime.ops._npu_fused_infer_attention_score_get_max_workspace(
            **given, actual_seq_lengths=ends, actual_seq_lengths_kv=seen
        )
    return shared[shape]
