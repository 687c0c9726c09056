"""Mirrors: host data of a step at fixed addresses, and what else has to happen before a replay."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from ktcore.backend.host import HostRuntime
from ktcore.backend.mirror import Mirrors, mirrored, upload
from ktcore.backend.runtime import Stream
from ktcore.ops.batch import StepBatch


def step(position: int, mirrors: Mirrors | None = None) -> StepBatch:
    return StepBatch(
        torch.zeros(1, dtype=torch.int64),
        torch.tensor([position]),
        (0, 1),
        (position + 1,),
        torch.zeros(1, 2, dtype=torch.int32),
        16,
        mirrors=mirrors,
    )


def test_a_fill_brings_the_next_steps_data_to_the_same_address() -> None:
    runtime, mirrors = HostRuntime(), Mirrors()
    there = mirrored(runtime, step(3, mirrors), "positions", lambda s: s.positions)
    mirrors.fill(step(9), runtime.new_stream())
    runtime.synchronize()
    assert there.tolist() == [9]
    assert mirrored(runtime, step(4, mirrors), "positions", lambda s: s.positions) is there


def test_what_was_registered_runs_after_the_copies_with_the_step_and_the_stream() -> None:
    runtime, mirrors = HostRuntime(), Mirrors()
    there = mirrored(runtime, step(3, mirrors), "positions", lambda s: s.positions)
    seen: list[tuple[tuple[int, ...], Stream, list[int]]] = []
    mirrors.at_fill(lambda now, stream: seen.append((now.context_lens, stream, there.tolist())))
    stream = runtime.new_stream()
    mirrors.fill(step(9), stream)
    mirrors.fill(step(10), stream)
    assert seen == [((10,), stream, [9]), ((11,), stream, [10])]


def test_a_step_of_another_shape_is_refused() -> None:
    runtime, mirrors = HostRuntime(), Mirrors()
    mirrored(runtime, step(3, mirrors), "table", lambda s: s.block_table)
    other = step(3)
    wide = StepBatch(
        other.token_ids, other.positions, other.q_start, other.context_lens, torch.zeros(1, 3, dtype=torch.int32), 16
    )
    with pytest.raises(ValueError, match=r"table@cpu is \[1, 3\] in this step, \[1, 2\] when captured"):
        mirrors.fill(wide, runtime.new_stream())


@pytest.mark.parametrize("captured", [False, True])
def test_the_host_does_not_wait_for_a_copy_out_of_pinned_memory(captured: bool) -> None:
    asked: list[Any] = []

    class Staged(SimpleNamespace):
        def copy_(self, host: torch.Tensor) -> None:
            asked.append(host.tolist())

        def to(self, device: str, non_blocking: bool = False) -> str:
            asked.append((device, non_blocking))
            return "there"

    def pinned(shape: tuple[int, ...], dtype: torch.dtype) -> Staged:
        asked.append((shape, dtype))
        return Staged()

    runtime: Any = SimpleNamespace(pinned_buffer=pinned, device="far:0")
    now = step(5, Mirrors() if captured else None)
    assert mirrored(runtime, now, "positions", lambda s: s.positions) == "there"
    assert asked == [((1,), torch.int64), [5], ("far:0", True)]
    # and all layers share it
    assert mirrored(runtime, now, "positions", lambda s: s.positions) == "there"
    assert len(asked) == 3
    assert upload(runtime, torch.ones(2, dtype=torch.int32)) == "there"
    assert asked[3:] == [((2,), torch.int32), [1, 1], ("far:0", True)]
