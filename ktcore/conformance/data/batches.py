"""Ragged batches whose KV pages lie scattered, so that a page taken from the wrong place shows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from ktcore.ops.batch import StepBatch

SPARE_PAGES = 3


@dataclass(frozen=True)
class Plan:
    """Sequences over time.

    Attributes:
        steps: for each step, new tokens of each sequence (0: the sequence is not in that step).
        page_size: tokens a page.
        pages: how many pages there are; some belong to nobody.
        tables: pages of each sequence, in order.
        slots: of each sequence's recurrent states; empty for operators without such.
    """

    steps: tuple[tuple[int, ...], ...]
    page_size: int
    pages: int
    tables: tuple[tuple[int, ...], ...]
    slots: tuple[int, ...] = ()

    def lengths(self) -> tuple[int, ...]:
        """Tokens of each sequence after the last step."""
        return tuple(sum(step[i] for step in self.steps) for i in range(len(self.tables)))


def scattered(steps: Sequence[Sequence[int]], page_size: int, rng: np.random.Generator) -> Plan:
    """Give every sequence pages from all over the cache."""
    count = len(steps[0])
    needed = [-(-sum(step[i] for step in steps) // page_size) for i in range(count)]
    pages = sum(needed) + SPARE_PAGES
    order = rng.permutation(pages).tolist()
    tables = []
    for n in needed:
        tables.append(tuple(order[:n]))
        order = order[n:]
    return Plan(tuple(tuple(s) for s in steps), page_size, pages, tuple(tables))


def batches(plan: Plan) -> list[tuple[StepBatch, list[tuple[int, slice]]]]:
    """Each step's batch, and for its rows in order which tokens of which sequence they are."""
    done = [0] * len(plan.tables)
    made = []
    for step in plan.steps:
        rows = [(i, slice(done[i], done[i] + n)) for i, n in enumerate(step) if n]
        for i, n in enumerate(step):
            done[i] += n
        made.append((_batch(plan, rows), rows))
    return made


def _batch(plan: Plan, rows: list[tuple[int, slice]]) -> StepBatch:
    starts = [0]
    for _, span in rows:
        starts.append(starts[-1] + span.stop - span.start)
    width = max(len(plan.tables[i]) for i, _ in rows) + 1
    table = torch.full((len(rows), width), -1, dtype=torch.int32)
    for row, (i, span) in enumerate(rows):
        # later blocks of the sequence are not there yet
        pages = plan.tables[i][: -(-span.stop // plan.page_size)]
        table[row, : len(pages)] = torch.tensor(pages, dtype=torch.int32)
    positions = torch.cat([torch.arange(span.start, span.stop) for _, span in rows])
    return StepBatch(
        token_ids=torch.zeros(starts[-1], dtype=torch.int64),
        positions=positions,
        q_start=tuple(starts),
        context_lens=tuple(span.stop for _, span in rows),
        block_table=table,
        page_size=plan.page_size,
        state_slots=tuple(plan.slots[i] for i, _ in rows) if plan.slots else (),
    )
