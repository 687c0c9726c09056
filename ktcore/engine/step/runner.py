"""Runs the loaded modules over a step's batch: the model's forward pass, in one screen."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field

import torch

from ktcore.backend.implementation import CacheOwner, ExpertLoad, KeepsStates, StateOwner
from ktcore.engine.experts.split import DeferralChain
from ktcore.engine.step.devices import Devices
from ktcore.engine.step.scores import Scores
from ktcore.ops.batch import StepBatch
from ktcore.weights.quantize import Loss


@dataclass(frozen=True)
class LoadedFurther:
    """The modules of the layer that predicts further tokens (`ktcore.graph.node.FurtherLayer`).

    Attributes:
        early: its FFN also takes the layer's input.
    """

    embed_norm: Callable[[torch.Tensor], torch.Tensor]
    hidden_norm: Callable[[torch.Tensor], torch.Tensor]
    project: Callable[[torch.Tensor], torch.Tensor]
    attention: Callable[..., torch.Tensor]
    ffn: Callable[..., torch.Tensor]
    norm: Callable[[torch.Tensor], torch.Tensor]
    early: bool = False


@dataclass(frozen=True)
class LoadedModel:
    """Modules in the graph's order, and those among them that own KV pages or recurrent states.

    Attributes:
        early: layers whose FFN also takes the layer's input, for a router that reads it.
        graph_device: the device whose graphs can hold a whole decode step; None where there is none.
        no_graphs: why not, in words; empty where there is one.
    """

    embed: Callable[[torch.Tensor], torch.Tensor]
    layers: tuple[tuple[Callable[..., torch.Tensor], Callable[..., torch.Tensor]], ...]
    early: frozenset[int]
    norm: Callable[[torch.Tensor], torch.Tensor]
    head: Callable[[torch.Tensor], torch.Tensor]
    sampler: Callable[..., int]
    caches: tuple[CacheOwner, ...]
    states: tuple[StateOwner, ...]
    devices: Devices
    deferred: DeferralChain
    losses: Mapping[str, Loss] = field(default_factory=dict)
    """What quantising while loading has cost, by operator."""
    graph_device: str | None = None
    no_graphs: str = ""
    expert_loads: Mapping[int, Sequence[ExpertLoad]] = field(default_factory=dict)
    """Layer -> modules that count what its experts are given."""
    told: frozenset[int] = frozenset()
    """Layers whose FFN also takes the step, for a router that goes by token ids."""
    further: LoadedFurther | None = None

    def running(self) -> AbstractContextManager[None]:
        """Within the context, work goes to the streams that the hand-offs are ordered by."""
        return self.devices.running()

    def hidden(self, step: StepBatch) -> torch.Tensor:
        """Last hidden states float32 [T, hidden], before the final norm."""
        return self.through_layers(self.embed(step.token_ids), step)

    def through_layers(self, x: torch.Tensor, step: StepBatch, begin: int = 0, end: int | None = None) -> torch.Tensor:
        """The same, from embeddings x float32 [T, hidden]; or from what layer `begin` takes to what `end` does."""
        # a step that failed half-way must not leave its debts to this one
        self.deferred.owed = None
        for i, (attention, ffn) in enumerate(self.layers[begin:end], begin):
            before = (x,) if i in self.early else (step,) if i in self.told else ()
            x = attention(x, step)
            x = ffn(x, *before)
        return x

    def further_states(self, normed: torch.Tensor, step: StepBatch) -> torch.Tensor:
        """States float32 [T, hidden] from which the head predicts the token behind each of the step's tokens.

        Args:
            normed: float32 [T, hidden], of the token before each: its last hidden state behind the final norm, or what
                this gave for it.
        """
        further = self.further
        assert further is not None, "the model was loaded without it"
        self.deferred.owed = None
        embedded, hidden = further.embed_norm(self.embed(step.token_ids)), further.hidden_norm(normed)
        x = further.project(torch.cat((embedded.to(hidden.device), hidden), dim=-1))
        y = further.attention(x, step)
        y = further.ffn(y, *((x,) if further.early else ()))
        return further.norm(y)

    @property
    def interruptible(self) -> bool:
        """Whether other steps may run between two layers of one: not where a layer owes something to the next."""
        return not self.deferred.used

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits float32 [n, vocab] on the CPU, from rows of `hidden`.

        Raises:
            Exception: what host experts of this step raised.
        """
        return self.scores(hidden).rows()

    def scores(self, hidden: torch.Tensor) -> Scores:
        """The same, left on the device."""
        return Scores(self.head(self.norm(hidden)), self.devices.check)

    def normed(self, hidden: torch.Tensor) -> torch.Tensor:
        """Hidden states float32 [n, hidden] after the final norm, on the CPU, from rows of `hidden`.

        Raises:
            Exception: what host experts of this step raised.
        """
        states = self.norm(hidden).cpu()
        self.devices.check()
        return states

    def allocate_pages(self, pages: int, page_size: int) -> None:
        """Make room for `pages` KV pages in every cache."""
        # a cache may fill them: on the stream of the steps, or that could happen after the first of them
        with self.running():
            for cache in self.caches:
                cache.allocate_pages(pages, page_size)

    def allocate_states(self, slots: int) -> None:
        """Make room for `slots` sequences in every recurrent state."""
        with self.running():
            for state in self.states:
                state.allocate_states(slots)

    @property
    def keeps_states(self) -> bool:
        """Whether every recurrent state can be kept behind some of a step's tokens (`StepBatch.kept_states`)."""
        return all(isinstance(state, KeepsStates) and state.keeps_states for state in self.states)

    def copy_states(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Copy recurrent states from slot to slot, of every layer."""
        for state in self.states if pairs else ():
            state.copy_states([source for source, _ in pairs], [target for _, target in pairs])

    def close(self) -> None:
        """Release the devices."""
        self.devices.close()
