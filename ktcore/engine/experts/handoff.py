"""The hand-off: an accelerator's stream gives host experts a token block and takes back their sum.

The host thread that launches device work does not block in between, where the runtime can call the host in a stream.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch

from ktcore.backend.lane import Lane, LaneJob
from ktcore.backend.runtime import DeviceRuntime, HostCallbackMode, Stream

Experts = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
SLOTS = 2


@runtime_checkable
class LaneExperts(Protocol):
    """Host experts that make lane jobs of their own, so that no Python runs on the lane."""

    def __call__(self, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """The plain call."""
        ...

    def lane_job(
        self, lane: Any, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, out: torch.Tensor
    ) -> LaneJob:
        """A job that reads x [T, hidden], ids [T, k], weights [T, k] and writes out [T, hidden], each time it runs."""
        ...


@dataclass
class _Block:
    """The part of a slot's pinned buffers that a submission of so many tokens uses, and a job that has run on it.

    Kept for the next submission of the same size: slicing four tensors and making a job would cost as much as the
    whole hand-off of one token.
    """

    hidden: torch.Tensor
    ids: torch.Tensor
    weights: torch.Tensor
    out: torch.Tensor
    job: LaneJob | None = None

    def first(self, tokens: int) -> _Block:
        """The first rows of every buffer."""
        return _Block(self.hidden[:tokens], self.ids[:tokens], self.weights[:tokens], self.out[:tokens])


@dataclass
class HandOffTicket:
    """An outstanding submission and where its result will be."""

    job: LaneJob
    block: _Block
    device: torch.device

    @property
    def error(self) -> BaseException | None:
        """What the experts raised when they last ran."""
        error = self.job.error
        if not error:
            return None
        return RuntimeError(f"host experts failed: {error}") if isinstance(error, str) else error


class HandOff:
    """Routed experts on the host, called from an accelerator's stream (`SubmittedExperts`).

    With host callbacks (`eager` or `capturable`) both ends ride on the stream: copies down, a callback that queues the
    job on the lane, later a callback that blocks the stream (not the host thread) until the job is done, and the copy
    up. Without them the lane's thread waits for the copies by event, and `wait` blocks the host thread.

    Args:
        experts: the host module; gets CPU tensors [T, hidden], [T, k], [T, k].
        runtime: of the device that calls.
        stream: the device stream that everything is ordered by.
        max_tokens: most tokens of a submission.
    """

    def __init__(
        self,
        experts: Experts,
        runtime: DeviceRuntime,
        stream: Stream,
        lane: Lane,
        hidden: int,
        top_k: int,
        max_tokens: int,
    ) -> None:
        self._experts = experts
        self._runtime = runtime
        self._stream = stream
        self._lane = lane
        self._max_tokens = max_tokens
        # two slots, so that the next block can be filled while one is read
        self._slots = [
            _Block(
                hidden=runtime.pinned_buffer((max_tokens, hidden), torch.float32),
                ids=runtime.pinned_buffer((max_tokens, top_k), torch.int64),
                weights=runtime.pinned_buffer((max_tokens, top_k), torch.float32),
                out=runtime.pinned_buffer((max_tokens, hidden), torch.float32),
            )
            for _ in range(SLOTS)
        ]
        self._blocks: list[dict[int, _Block]] = [{} for _ in range(SLOTS)]
        self._turn = 0
        self._outstanding: list[HandOffTicket] = []

    def __call__(self, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """Submit and wait."""
        return self.wait(self.submit(x, ids, weights))

    def submit(self, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> HandOffTicket:
        """Start the experts on x [T, hidden], ids [T, k], weights [T, k], all on the device.

        Raises:
            ValueError: more tokens than the buffers hold.
        """
        tokens = x.shape[0]
        if tokens > self._max_tokens:
            raise ValueError(f"{tokens} tokens submitted, the hand-off buffers hold {self._max_tokens}")
        block = self._next_block(tokens)
        copy, stream = self._runtime.copy_async, self._stream
        copy(block.hidden, x.float(), stream)
        copy(block.ids, ids, stream)
        copy(block.weights, weights.float(), stream)
        job = self._job(block)
        if self._runtime.host_callback is HostCallbackMode.NONE:
            job.start()
        else:
            self._runtime.launch_host(stream, self._lane.start_address, job.address)
        ticket = HandOffTicket(job, block, x.device)
        self._outstanding.append(ticket)
        return ticket

    def wait(self, ticket: HandOffTicket) -> torch.Tensor:
        """The sum, float32 [T, hidden] on the device, complete for whatever the stream runs next.

        Raises:
            Exception: what the experts raised, when it is known already; otherwise `check` raises it.
        """
        if self._runtime.host_callback is HostCallbackMode.NONE:
            ticket.job.wait()
            self.check()
        else:
            self._runtime.launch_host(self._stream, self._lane.wait_address, ticket.job.address)
        with self._runtime.use_stream(self._stream):
            out = torch.empty(ticket.block.out.shape, device=ticket.device)
        self._runtime.copy_async(out, ticket.block.out, self._stream)
        return out

    def check(self) -> None:
        """Raise what experts raised since the last call; the engine calls it once a step's result is on the host."""
        still = []
        failed: BaseException | None = None
        for ticket in self._outstanding:
            if ticket.job.done:
                failed = failed or ticket.error
            else:
                still.append(ticket)
        self._outstanding = still
        if failed:
            raise failed

    def take_over(self) -> list[HandOffTicket]:
        """The outstanding tickets, for the owner of a captured graph: a replay runs their jobs again.

        They must live as long as the graph; the owner looks at `ticket.error` after each replay.
        """
        taken, self._outstanding = self._outstanding, []
        for ticket in taken:
            ticket.block.job = None
        return taken

    def _next_block(self, tokens: int) -> _Block:
        slot = self._turn % SLOTS
        self._turn += 1
        block = self._blocks[slot].get(tokens)
        if block is None:
            block = self._blocks[slot][tokens] = self._slots[slot].first(tokens)
        return block

    def _job(self, block: _Block) -> LaneJob:
        """The host work of one submission; without callbacks it begins by waiting for the copies."""
        if self._runtime.host_callback is HostCallbackMode.NONE:
            copied = self._runtime.record_event(self._stream)

            def work() -> None:
                self._runtime.synchronize(copied)
                self._compute(block)

            return self._lane.job(work)
        # a job that may still run, or whose error nobody has seen, is not used again
        if block.job is None or any(ticket.job is block.job for ticket in self._outstanding):
            block.job = self._new_job(block)
        return block.job

    def _new_job(self, block: _Block) -> LaneJob:
        if isinstance(self._experts, LaneExperts):
            return self._experts.lane_job(self._lane, block.hidden, block.ids, block.weights, block.out)
        return self._lane.job(lambda: self._compute(block))

    def _compute(self, block: _Block) -> None:
        with torch.inference_mode():
            # poison first: a result that is not written must not look like the last one
            block.out.fill_(float("nan"))
            block.out.copy_(self._experts(block.hidden, block.ids, block.weights))
