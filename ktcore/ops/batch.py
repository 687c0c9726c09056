"""One step's ragged batch of tokens: what attention and KV caches need to know about it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar

import torch

T = TypeVar("T")
_CHOSEN = "chosen tokens"


@dataclass(frozen=True, eq=False)
class StepBatch:
    """Query tokens of several sequences, one after another.

    Lengths are kept on the host as tuples *and* can be mirrored on a device: some kernels want device tensors, others
    host lists. Sequence i owns the tokens q_start[i] .. q_start[i+1]-1; they are its last ones, so with context_lens[i]
    counted after this step, token j of it sits at position context_lens[i] - (q_start[i+1] - q_start[i]) + j.

    Attributes:
        token_ids: int64 [T], on the CPU.
        positions: int64 [T], on the CPU.
        q_start: n + 1 offsets into the tokens.
        context_lens: n lengths, cached tokens after this step.
        block_table: int32 [n, max_blocks] on the CPU: page of each block of a sequence, -1 where there is none.
        page_size: tokens a page.
        state_slots: n places in the recurrent states, one a sequence; empty for models without such states.
        kept_states: (slot, tokens) of each sequence: the slot that is given its state after the first so many of its
            tokens in the step, -1 for none; empty where nothing is kept, and for models whose modules do not all keep
            states (`ktcore.backend.implementation.KeepsStates`).
        mirrors: keeps device copies of the step's data at fixed addresses (`ktcore.backend.mirror.Mirrors`), for steps
            that are captured; None: copies are the step's own.
    """

    token_ids: torch.Tensor
    positions: torch.Tensor
    q_start: tuple[int, ...]
    context_lens: tuple[int, ...]
    block_table: torch.Tensor
    page_size: int
    state_slots: tuple[int, ...] = ()
    kept_states: tuple[tuple[int, int], ...] = ()
    mirrors: object | None = field(default=None, repr=False)
    _derived: dict[str, object] = field(default_factory=dict, repr=False)

    @property
    def tokens(self) -> int:
        """Number of query tokens T."""
        return self.q_start[-1]

    @property
    def sequences(self) -> int:
        """Number of sequences n."""
        return len(self.context_lens)

    def starts(self, sequence: int) -> bool:
        """Whether a sequence begins with this step: its recurrent states are zero then, whatever their slot holds."""
        return self.context_lens[sequence] == self.q_start[sequence + 1] - self.q_start[sequence]

    def derived(self, key: str, make: Callable[[StepBatch], T]) -> T:
        """What a backend computes once a step and uses in every layer (device mirrors, a native descriptor)."""
        if key not in self._derived:
            self._derived[key] = make(self)
        return self._derived[key]  # type: ignore[return-value]

    def hand_on(self, chosen: torch.Tensor) -> None:
        """Keep what a token indexer chose, int32 [T, top_k], for attention here and in layers that share it.

        It stays on the device that it was made on.
        """
        self._derived[_CHOSEN] = chosen

    def handed_on(self) -> torch.Tensor:
        """What was handed on last.

        Raises:
            RuntimeError: nothing was; a graph's first layer with sparse attention has an indexer of its own.
        """
        if _CHOSEN not in self._derived:
            raise RuntimeError("no token indexer has run in this step")
        return self._derived[_CHOSEN]  # type: ignore[return-value]

    def slots(self) -> torch.Tensor:
        """int64 [T]: page * page_size + offset where each token's key and value are stored."""
        return self.derived("slots", _slots)


def _slots(step: StepBatch) -> torch.Tensor:
    out = torch.empty(step.tokens, dtype=torch.int64)
    for i in range(step.sequences):
        span = slice(step.q_start[i], step.q_start[i + 1])
        position = step.positions[span]
        page = step.block_table[i].long()[position // step.page_size]
        out[span] = page * step.page_size + position % step.page_size
    return out
