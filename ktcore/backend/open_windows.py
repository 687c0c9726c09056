"""Windows of tokens that are not whole yet: what they will be pooled from, a state a sequence, on any torch device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from ktcore.errors import BackendError
from ktcore.ops.batch import StepBatch
from ktcore.ops.compressed import EntryCacheSpec, closed, pooled


@dataclass(frozen=True)
class Closings:
    """The windows that close in a step, sequence by sequence.

    Attributes:
        windows: of each sequence.
        starts: int64 [m], positions of their first tokens.
        places: int64 [m], where their entries lie: page * entries a page + place in the page.
    """

    windows: tuple[range, ...]
    starts: torch.Tensor
    places: torch.Tensor


def closings(step: StepBatch, ratio: int) -> Closings:
    """Computed once a step for all layers of a ratio."""
    return step.derived(f"closings of {ratio}", lambda s: _closings(s, ratio))


def page_entries(page_size: int, ratio: int) -> int:
    """Entries that a page has room for."""
    return max(1, page_size // ratio)


def places(step: StepBatch, sequence: int, windows: range, ratio: int) -> torch.Tensor:
    """int64 [windows]: where entries of a sequence lie, in the page of their window's last token."""
    last = np.arange(windows.start + 1, windows.stop + 1, dtype=np.int64) * ratio - 1
    page = step.block_table[sequence].numpy()[last // step.page_size].astype(np.int64)
    return torch.from_numpy(page * page_entries(step.page_size, ratio) + last % step.page_size // ratio)


def spans(step: StepBatch) -> list[tuple[slice, int]]:
    """For each sequence: the span of its tokens, and how many it had before the step."""
    found = []
    for i in range(step.sequences):
        span = slice(step.q_start[i], step.q_start[i + 1])
        found.append((span, step.context_lens[i] - (span.stop - span.start)))
    return found


class OpenWindows:
    """A ring of the last tokens' values and gates a slot; row p mod rows is position p's."""

    def __init__(self, name: str, spec: EntryCacheSpec, device: torch.device) -> None:
        self._name = name
        self._spec = spec
        self._device = device
        self._rings = torch.empty(0)
        self._held = torch.empty(0, dtype=torch.int64)

    def allocate_states(self, slots: int) -> None:
        """Make room for `slots` sequences; earlier content is gone."""
        self._rings = torch.zeros(slots, self._spec.rows, 2, self._spec.width, device=self._device)
        self._held = torch.full((slots,), -1)

    def state_tensors(self) -> tuple[torch.Tensor, ...]:
        """How many tokens slots hold [slots], and the rings."""
        return self._held, self._rings

    def copy_states(self, source: Sequence[int], target: Sequence[int]) -> None:
        """Copy slots `source` to slots `target`, pair by pair."""
        for a, b in zip(source, target, strict=True):
            self._rings[b], self._held[b] = self._rings[a], self._held[a]

    def pool(self, step: StepBatch, values: torch.Tensor, gates: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """As `EntryCacheSpec` says.

        Raises:
            BackendError: a slot was not allocated, or holds other tokens than the sequence has behind it.
        """
        new = torch.stack((values.float(), gates.float()), 1)
        found = closings(step, self._spec.ratio)
        made = []
        for i, (span, before) in enumerate(spans(step)):
            slot = self._checked(step, i, before)
            ring = self._rings[slot]
            if found.windows[i]:
                made.append(self._pooled(ring, new[span], before, found.windows[i]))
            last = torch.arange(before, step.context_lens[i])[-self._spec.rows :] % self._spec.rows
            ring[last.to(ring.device)] = new[span][-self._spec.rows :]
            self._held[slot] = step.context_lens[i]
        return torch.cat(made) if made else new.new_zeros(0, self._spec.dim), found.starts.to(self._device)

    def _pooled(self, ring: torch.Tensor, new: torch.Tensor, before: int, windows: range) -> torch.Tensor:
        """Of one sequence's windows that close: [windows, dim]."""
        s = self._spec
        first = max(0, (windows.start - s.overlap) * s.ratio)
        old = torch.arange(first, before, device=ring.device)
        rows = torch.cat((ring[old % s.rows], new))[: windows.stop * s.ratio - first]
        values, gates = rows.view(-1, s.ratio, 2, s.width).unbind(2)
        if s.overlap:
            values, gates = overlapping(values, s.dim, 0.0), overlapping(gates, s.dim, float("-inf"))
        return pooled(values, gates)[-len(windows) :]

    def _checked(self, step: StepBatch, sequence: int, before: int) -> int:
        if len(step.state_slots) != step.sequences:
            raise BackendError(f"{self._name}: {step.sequences} sequences have {len(step.state_slots)} state slots")
        slot = step.state_slots[sequence]
        if not 0 <= slot < len(self._held):
            raise BackendError(f"{self._name}: the step uses state slot {slot}, {len(self._held)} were allocated")
        held = int(self._held[slot])
        if before and held != before:
            raise BackendError(f"{self._name}: slot {slot} holds the state after {held} tokens, {before} are needed")
        return slot


def overlapping(rows: torch.Tensor, dim: int, nothing: float) -> torch.Tensor:
    """Rows [windows, ratio, 2 * dim] -> [windows, 2 * ratio, dim]: first halves of the window before, own second ones.

    Args:
        nothing: stands for the window before the first row.
    """
    earlier = torch.cat((torch.full_like(rows[:1], nothing), rows[:-1]))
    return torch.cat((earlier[..., :dim], rows[..., dim:]), 1)


def _closings(step: StepBatch, ratio: int) -> Closings:
    windows = tuple(closed(before, step.context_lens[i], ratio) for i, (_, before) in enumerate(spans(step)))
    starts = [torch.arange(w.start, w.stop) * ratio for w in windows]
    where = [places(step, i, w, ratio) for i, w in enumerate(windows)]
    return Closings(windows, torch.cat(starts), torch.cat(where))
