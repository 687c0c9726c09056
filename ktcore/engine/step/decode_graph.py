"""Whole decode steps as device graphs: captured once for a number of sequences, replayed for every step of so many.

A replay costs one launch where a step costs thousands; the hand-offs to host experts are part of it. Host data reaches
the graph through `Mirrors`, and sequences that are not there run on a page and a state that no sequence owns.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch

from ktcore.backend.mirror import Mirrors
from ktcore.backend.record import describe
from ktcore.backend.runtime import DeviceGraph, GraphMode, HostCallbackMode
from ktcore.engine.experts.handoff import HandOffTicket
from ktcore.engine.step.devices import Devices
from ktcore.engine.step.runner import LoadedModel
from ktcore.engine.step.scores import Scores
from ktcore.errors import BackendError
from ktcore.ops.batch import StepBatch
from ktcore.ops.moe import ExpertsSpec
from ktcore.rules.plan import Plan

SIZES = (1, 2, 4, 8, 16, 32)


def graph_device(plan: Plan, devices: Devices) -> tuple[str | None, str]:
    """The device whose graphs can hold whole decode steps of a loaded plan, or None and why not."""
    graph = plan.graph
    layers = [root for layer in graph.layers for root in (layer.attn, layer.ffn)]
    nodes = [node for root in (*layers, graph.norm, graph.head) for node in root.walk() if node.name in plan.choices]
    places = {plan.choices[root.name].device for root in (*layers, graph.norm, graph.head)}
    if len(places) > 1:
        return None, f"layers live on several devices: {', '.join(sorted(places))}"
    (device,) = places
    runtime = devices.runtime(device)
    if runtime.device.type == "cpu":
        return None, "the model runs on the host"
    if runtime.graph is GraphMode.NONE:
        return None, f"{device} has no graphs"
    if devices.hands_off and runtime.host_callback is not HostCallbackMode.CAPTURABLE:
        return None, f"host callbacks of {device} cannot be captured ({runtime.host_callback.value})"
    for node in nodes:
        choice = plan.choices[node.name]
        handed_off = isinstance(node.spec, ExpertsSpec)
        if choice.device != device and not handed_off:
            return None, f"{node.name} runs on {choice.device}"
        if choice.device == device and not choice.implementation.capturable:
            return None, f"{choice.implementation.id} ({node.name}) cannot be captured"
        resident = choice.resident
        if resident is not None and (resident.device != device or not resident.implementation.capturable):
            return None, f"{resident.implementation.id} ({node.name}, on {resident.device}) cannot be captured"
    return device, ""


@dataclass
class _Captured:
    graph: DeviceGraph
    mirrors: Mirrors
    x: torch.Tensor
    hidden: torch.Tensor
    logits: torch.Tensor
    tickets: list[HandOffTicket]

    def check(self) -> None:
        """Raise what host experts of the last replay raised."""
        for ticket in self.tickets:
            if ticket.error is not None:
                raise ticket.error


def one_by_one(step: StepBatch) -> StepBatch:
    """A step of as many sequences as it has tokens: each token the last one of its own, over pages that are shared."""
    lengths = [end - begin for begin, end in pairwise(step.q_start)]
    return StepBatch(
        token_ids=step.token_ids,
        positions=step.positions,
        q_start=tuple(range(step.tokens + 1)),
        context_lens=tuple((step.positions + 1).tolist()),
        block_table=step.block_table.repeat_interleave(torch.tensor(lengths), 0),
        page_size=step.page_size,
    )


class DecodeGraphs:
    """The captured steps of one engine.

    Args:
        model: one with a `graph_device`.
        page, slot: of KV cache and recurrent states, which no sequence owns.
        width: pages of the longest sequence.
    """

    def __init__(self, model: LoadedModel, page: int, slot: int | None, page_size: int, width: int) -> None:
        assert model.graph_device is not None, model.no_graphs
        self._model = model
        self._device = model.graph_device
        self._page = page
        self._slot = slot
        self._page_size = page_size
        self._width = width
        self._captured: dict[int, _Captured] = {}

    @property
    def sizes(self) -> tuple[int, ...]:
        """Numbers of sequences that steps have been captured for."""
        return tuple(sorted(self._captured))

    def run(self, step: StepBatch) -> tuple[torch.Tensor, Scores] | None:
        """Last hidden states float32 [n, hidden] and scores, a row for each sequence of a decode step, in its order;
        None for a step of another kind. Both are valid until the next step.

        A step that checks guesses is one, too, as `one_by_one` has it: each layer stores the keys and values of all its
        rows before any of them attends.

        Call it with the engine's streams current (`LoadedModel.running`).

        Raises:
            BackendError: the step cannot be captured, with the device's reason.
        """
        if step.tokens != step.sequences or step.sequences > SIZES[-1]:
            return None
        size = next(s for s in SIZES if s >= step.sequences)
        if size not in self._captured:
            self._captured[size] = self._capture(size)
        captured = self._captured[size]
        stream = self._model.devices.stream(self._device)
        padded = self._padded(step, size)
        captured.x.copy_(self._model.embed(padded.token_ids))
        captured.mirrors.fill(padded, stream)
        captured.graph.replay(stream)
        return captured.hidden[: step.sequences], Scores(captured.logits[: step.sequences], captured.check)

    def _capture(self, size: int) -> _Captured:
        model, runtime = self._model, self._model.devices.runtime(self._device)
        stream = model.devices.stream(self._device)
        # its first token, so that the scratch page holds a number where the step to capture reads it
        model.hidden(self._idle(size, position=0, mirrors=None))
        mirrors = Mirrors()
        step = self._idle(size, position=1, mirrors=mirrors)
        x = model.embed(step.token_ids).to(runtime.device).clone()
        found: list[torch.Tensor] = []

        def work() -> None:
            hidden = model.through_layers(x, step)
            found[:] = [hidden, model.head(model.norm(hidden))]

        work()
        runtime.synchronize(stream)
        model.devices.check()
        try:
            graph = runtime.capture(stream, work)
        except Exception as error:
            raise BackendError(
                f"the decode step of {size} sequences cannot be captured on {self._device}: {describe(error)}",
                "load the model without graphs (graphs=False, --no-graphs)",
            ) from error
        hidden, logits = found
        return _Captured(graph, mirrors, x, hidden, logits, model.devices.take_over())

    def _idle(self, size: int, position: int, mirrors: Mirrors | None) -> StepBatch:
        """A step of sequences that nobody asked for, all on the scratch page."""
        table = torch.full((size, self._width), -1, dtype=torch.int32)
        table[:, 0] = self._page
        return StepBatch(
            token_ids=torch.zeros(size, dtype=torch.int64),
            positions=torch.full((size,), position, dtype=torch.int64),
            q_start=tuple(range(size + 1)),
            context_lens=(position + 1,) * size,
            block_table=table,
            page_size=self._page_size,
            state_slots=() if self._slot is None else (self._slot,) * size,
            mirrors=mirrors,
        )

    def _padded(self, step: StepBatch, size: int) -> StepBatch:
        """`step` with idle sequences up to `size`, and a block table as wide as that of the capture."""
        n = step.sequences
        idle = self._idle(size, 1, None)
        table = idle.block_table
        table[:n] = -1
        table[:n, : step.block_table.shape[1]] = step.block_table
        return StepBatch(
            token_ids=torch.cat((step.token_ids, idle.token_ids[n:])),
            positions=torch.cat((step.positions, idle.positions[n:])),
            q_start=idle.q_start,
            context_lens=step.context_lens + idle.context_lens[n:],
            block_table=table,
            page_size=self._page_size,
            state_slots=step.state_slots + idle.state_slots[n:],
        )
