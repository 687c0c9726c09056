"""The hand-off: an accelerator's stream gives host experts a token block and takes back their sum.

The host thread that launches device work does not block in between, where the runtime can call the host in a stream.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch

from ktcore.backend.lane import Lane, LaneJob
from ktcore.backend.record import describe
from ktcore.backend.runtime import DeviceRuntime, HostCallbackMode, Stream
from ktcore.errors import ExpertsError

Experts = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
SLOTS = 2
"""Submissions that may be outstanding: the next block is filled while one is read."""
SIZES = 16
"""Numbers of tokens whose views and jobs are kept, a slot."""


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
    """An outstanding submission and where its result will be.

    Attributes:
        slot: the buffers that are its own until it is waited for.
    """

    job: LaneJob
    block: _Block
    device: torch.device
    slot: int

    @property
    def error(self) -> ExpertsError | None:
        """What the experts raised when they last ran."""
        error = self.job.error
        if error is None or error == "":
            return None
        found = ExpertsError(f"experts on the host failed: {error if isinstance(error, str) else describe(error)}")
        found.__cause__ = None if isinstance(error, str) else error
        return found


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
        self._slots = [
            _Block(
                hidden=runtime.pinned_buffer((max_tokens, hidden), torch.float32),
                ids=runtime.pinned_buffer((max_tokens, top_k), torch.int64),
                weights=runtime.pinned_buffer((max_tokens, top_k), torch.float32),
                out=runtime.pinned_buffer((max_tokens, hidden), torch.float32),
            )
            for _ in range(SLOTS)
        ]
        self._blocks: list[OrderedDict[int, _Block]] = [OrderedDict() for _ in range(SLOTS)]
        self._turn = 0
        self._held: list[HandOffTicket | None] = [None] * SLOTS
        self._outstanding: list[HandOffTicket] = []

    def __call__(self, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """Submit and wait."""
        return self.wait(self.submit(x, ids, weights))

    def submit(self, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> HandOffTicket:
        """Start the experts on x [T, hidden], ids [T, k], weights [T, k], all on the device.

        Raises:
            ExpertsError: more tokens than the buffers hold, or more submissions outstanding than there are slots.
        """
        tokens = x.shape[0]
        if tokens > self._max_tokens:
            raise ExpertsError(f"{tokens} tokens submitted, the hand-off buffers hold {self._max_tokens}")
        slot = self._free_slot()
        block = self._block(slot, tokens)
        copy, stream = self._runtime.copy_async, self._stream
        copy(block.hidden, x.float(), stream)
        copy(block.ids, ids, stream)
        copy(block.weights, weights.float(), stream)
        job = self._job(block)
        if self._runtime.host_callback is HostCallbackMode.NONE:
            job.start()
        else:
            self._runtime.launch_host(stream, self._lane.start_address, job.address)
        ticket = HandOffTicket(job, block, x.device, slot)
        self._held[slot] = ticket
        self._outstanding.append(ticket)
        return ticket

    def wait(self, ticket: HandOffTicket) -> torch.Tensor:
        """The sum, float32 [T, hidden] on the device, complete for whatever the stream runs next.

        Raises:
            ExpertsError: the experts failed, when that is known already, otherwise `check` raises it; or the ticket was
                waited for before, or is another hand-off's.
        """
        if self._held[ticket.slot] is not ticket:
            raise ExpertsError("a ticket can be waited for once, by the hand-off that gave it")
        self._held[ticket.slot] = None
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
        """Raise what experts raised since the last call; the engine calls it once a step's result is on the host.

        Raises:
            ExpertsError: the first failure; the others are gone with it.
        """
        still = []
        failed: ExpertsError | None = None
        for ticket in self._outstanding:
            if ticket.job.done:
                failed = failed or ticket.error
            else:
                still.append(ticket)
        self._outstanding = still
        if failed:
            raise failed

    def abandon(self) -> None:
        """Forget all tickets, after a step that failed: no job runs any more, and what it raised is nobody's affair."""
        tickets = [*self._outstanding, *(ticket for ticket in self._held if ticket is not None)]
        if not tickets:
            return
        # callbacks that are still to start jobs would find their buffers in use by others
        self._runtime.synchronize(self._stream)
        for ticket in tickets:
            ticket.job.wait()
        self._outstanding = []
        self._held = [None] * SLOTS

    def take_over(self) -> list[HandOffTicket]:
        """The outstanding tickets, for the owner of a captured graph: a replay runs their jobs again.

        They must live as long as the graph; the owner looks at `ticket.error` after each replay.
        """
        taken, self._outstanding = self._outstanding, []
        for ticket in taken:
            ticket.block.job = None
        return taken

    def _free_slot(self) -> int:
        """The slot that was used least recently of those that no ticket holds."""
        for turn in range(self._turn, self._turn + SLOTS):
            slot = turn % SLOTS
            if self._held[slot] is None:
                self._turn = turn + 1
                return slot
        raise ExpertsError(
            f"{SLOTS} submissions are outstanding, as many as there are buffers for",
            "wait for a ticket before the next submission",
        )

    def _block(self, slot: int, tokens: int) -> _Block:
        """The slot's first rows, with a job that has run on them: the most recently used sizes are kept."""
        kept = self._blocks[slot]
        block = kept.get(tokens)
        if block is None:
            block = kept[tokens] = self._slots[slot].first(tokens)
            if len(kept) > SIZES:
                kept.popitem(last=False)
        else:
            kept.move_to_end(tokens)
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
