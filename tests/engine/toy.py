"""A model small enough to know its answers by heart: the next token is the sum of all before it, modulo the vocabulary.

It reads what it adds up from its KV pages, or from its recurrent states, so a wrong page, position or slot shows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch

from ktcore.engine.experts.split import DeferralChain
from ktcore.engine.step.devices import Devices
from ktcore.engine.step.engine import Engine
from ktcore.engine.step.runner import LoadedModel
from ktcore.ops.batch import StepBatch
from ktcore.ops.sampling import sample

VOCAB = 127
"""So that doubling, which is how a sum of sums goes on, comes back after seven tokens: 1, 2, 4, 8, 16, 32, 64."""


def answer(prompt: Sequence[int], new: int) -> list[int]:
    """What follows a prompt."""
    tokens = list(prompt)
    for _ in range(new):
        tokens.append(sum(tokens) % VOCAB)
    return tokens[len(prompt) :]


class Pages:
    """Adds up a sequence's tokens out of its pages."""

    def allocate_pages(self, pages: int, page_size: int) -> None:
        self.memory = torch.full((pages, page_size), -1000)

    def page_tensors(self) -> list[torch.Tensor]:
        return [self.memory]

    def __call__(self, x: torch.Tensor, step: StepBatch) -> torch.Tensor:
        assert step.block_table.dtype == torch.int32, "as `StepBatch` promises"
        assert step.context_lens == tuple((step.positions[[end - 1 for end in step.q_start[1:]]] + 1).tolist())
        assert ((step.block_table >= -1) & (step.block_table < len(self.memory))).all()
        self.memory.view(-1)[step.slots()] = step.token_ids
        sums = []
        for i in range(step.sequences):
            table = step.block_table[i]
            for position in step.positions[step.q_start[i] : step.q_start[i + 1]].tolist():
                pages = table[: position // step.page_size + 1].long()
                sums.append(self.memory[pages].view(-1)[: position + 1].sum())
        return torch.nn.functional.one_hot(torch.stack(sums) % VOCAB, VOCAB).float()


class States:
    """Adds up a sequence's tokens in a state; its pages hold nothing that is read."""

    def allocate_states(self, slots: int) -> None:
        self.memory = torch.full((slots, 1), -1000)

    def copy_states(self, source: Sequence[int], target: Sequence[int]) -> None:
        self.memory[list(target)] = self.memory[list(source)]

    def state_tensors(self) -> list[torch.Tensor]:
        return [self.memory]

    def __call__(self, x: torch.Tensor, step: StepBatch) -> torch.Tensor:
        sums = []
        for i, slot in enumerate(step.state_slots):
            span = slice(step.q_start[i], step.q_start[i + 1])
            for token, position in zip(step.token_ids[span], step.positions[span], strict=True):
                self.memory[slot] = (0 if position == 0 else self.memory[slot]) + token
                sums.append(self.memory[slot, 0].clone())
        return torch.nn.functional.one_hot(torch.stack(sums) % VOCAB, VOCAB).float()


def _none(name: str) -> Any:
    raise AssertionError(f"{name} was opened")


class KeptStates(States):
    """Leaves the state behind some of a step's tokens in another slot, where it is asked to."""

    keeps_states = True

    def __call__(self, x: torch.Tensor, step: StepBatch) -> torch.Tensor:
        found = []
        for i, slot in enumerate(step.state_slots):
            begin, end = step.q_start[i], step.q_start[i + 1]
            other, count = step.kept_states[i] if step.kept_states else (-1, 0)
            for a, b in ((begin, begin + count), (begin + count, end)):
                one = replace(
                    step,
                    token_ids=step.token_ids[a:b],
                    positions=step.positions[a:b],
                    q_start=(0, b - a),
                    context_lens=(0,),
                    state_slots=(slot,),
                )
                found += [super().__call__(x, one)] if b > a else []
                if other >= 0 and b == begin + count:
                    self.memory[other] = self.memory[slot]
        return torch.cat(found)


class NoDevices(Devices):
    """No device at all; `fails` is what host experts raised."""

    def __init__(self, fails: Exception | None = None) -> None:
        super().__init__(_none)
        self.fails = fails

    def check(self) -> None:
        if self.fails is not None:
            raise self.fails


def toy(part: Any = None, devices: Devices | None = None, head: Callable[..., torch.Tensor] | None = None) -> Any:
    """The model as the engine sees it: one layer, whose attention adds up."""
    part = part or Pages()
    caches: list[Any] = [part if hasattr(part, "allocate_pages") else Pages()]
    return LoadedModel(
        embed=lambda ids: torch.zeros(len(ids), VOCAB),
        layers=((part, lambda x: x),),
        early=frozenset(),
        norm=lambda x: x,
        head=head or (lambda x: x),
        sampler=sample,
        caches=tuple(caches),
        states=(part,) if isinstance(part, States) else (),
        devices=devices or NoDevices(),
        deferred=DeferralChain(),
    )


def engine(part: Any = None, context: int = 256, page_size: int = 4, **options: Any) -> Engine:
    """An engine over the toy."""
    return Engine(toy(part), context, page_size, **options)


def run(made: Engine, *sequences: Any) -> None:
    """All at once, to their ends."""
    for sequence in sequences:
        made.add(sequence)
    for _ in range(2000):
        if not made.step():
            return
    raise AssertionError("the engine does not come to an end")
