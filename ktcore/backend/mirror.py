"""Host data of a step on a device: made and copied once a step, used by every layer.

A captured graph reads fixed addresses, so a step that is to be captured brings a `Mirrors`, which keeps each mirror's
place and fills it anew before every replay.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from ktcore.backend.runtime import DeviceRuntime, Stream
from ktcore.ops.batch import StepBatch

Make = Callable[[StepBatch], torch.Tensor]
Fill = Callable[[StepBatch, Stream], None]


def upload(runtime: DeviceRuntime, host: torch.Tensor) -> torch.Tensor:
    """A copy of `host` on the device, in order with the current stream; the host thread does not wait for it.

    Host memory is staged in a pinned buffer, which the copy keeps alive.
    """
    staged = runtime.pinned_buffer(tuple(host.shape), host.dtype)
    staged.copy_(host)
    return staged.to(runtime.device, non_blocking=True)


def mirrored(runtime: DeviceRuntime, step: StepBatch, what: str, make: Make) -> torch.Tensor:
    """`make(step)` on the device, one copy a step for all layers.

    Args:
        what: names the data; two makers of one name must make the same.
        make: a tensor on the CPU. For steps of equal `tokens`, `sequences` and width of the block table it must have
            the same shape, or a step cannot be captured.
    """
    key = f"{what}@{runtime.device}"
    if isinstance(step.mirrors, Mirrors):
        return step.mirrors.get(key, runtime, step, make)
    return step.derived(key, lambda s: upload(runtime, make(s)))


@dataclass
class _Mirror:
    make: Make
    runtime: DeviceRuntime
    staged: torch.Tensor
    there: torch.Tensor


class Mirrors:
    """Mirrors with fixed addresses, for all steps of one shape."""

    def __init__(self) -> None:
        self._held: dict[str, _Mirror] = {}
        self._also: list[Fill] = []

    def at_fill(self, fill: Fill) -> None:
        """Have `fill(step, stream)` called at every fill, after the copies: for arguments that a graph took by value.

        Whoever launches such an operator while it is captured registers how the next step's are put there.
        """
        self._also.append(fill)

    def get(self, key: str, runtime: DeviceRuntime, step: StepBatch, make: Make) -> torch.Tensor:
        """The mirror of that name; made and copied on the current stream when first asked for."""
        held = self._held.get(key)
        if held is None:
            host = make(step)
            staged = runtime.pinned_buffer(tuple(host.shape), host.dtype)
            staged.copy_(host)
            held = self._held[key] = _Mirror(make, runtime, staged, staged.to(runtime.device, non_blocking=True))
        return held.there

    def fill(self, step: StepBatch, stream: Stream) -> None:
        """Copy what `step` has into every mirror on `stream`; the copies of the step before must be done.

        Raises:
            ValueError: a mirror of this step has another shape.
        """
        for key, held in self._held.items():
            host = held.make(step)
            if host.shape != held.staged.shape:
                raise ValueError(f"{key} is {list(host.shape)} in this step, {list(held.staged.shape)} when captured")
            held.staged.copy_(host)
            held.runtime.copy_async(held.there, held.staged, stream)
        for fill in self._also:
            fill(step, stream)
