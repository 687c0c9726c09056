"""A step's ragged batch, made of the tokens that each of its sequences runs."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass

import numpy as np
import torch

from ktcore.engine.schedule.sequence import Sequence
from ktcore.ops.batch import StepBatch


@dataclass(frozen=True)
class Span:
    """Token ids that a sequence runs at positions from `start` on; it has the pages for them.

    Attributes:
        keep: the state behind so many of them goes to the sequence's spare slot; 0: none does.
    """

    sequence: Sequence
    ids: Seq[int]
    start: int
    keep: int = 0

    @property
    def end(self) -> int:
        """The position behind them."""
        return self.start + len(self.ids)


def step_batch(spans: Seq[Span], page_size: int) -> StepBatch:
    """The batch of `spans`, one after another; with the states of those that have some."""
    ids: list[int] = []
    positions: list[int] = []
    starts = [0]
    blocks = [-(-span.end // page_size) for span in spans]
    width = max(blocks)
    table = []
    for span, used in zip(spans, blocks, strict=True):
        ids += span.ids
        positions += range(span.start, span.end)
        starts.append(len(ids))
        table.append(span.sequence.pages[:used] + [-1] * (width - used))
    return StepBatch(
        # by numpy: of short lists torch makes tensors several times as slowly
        token_ids=torch.from_numpy(np.array(ids, np.int64)),
        positions=torch.from_numpy(np.array(positions, np.int64)),
        q_start=tuple(starts),
        context_lens=tuple(span.end for span in spans),
        block_table=torch.from_numpy(np.array(table, np.int32)),
        page_size=page_size,
        state_slots=tuple(s.sequence.state_slot for s in spans if s.sequence.state_slot is not None),
        kept_states=tuple(map(_kept, spans)) if any(span.keep for span in spans) else (),
    )


def _kept(span: Span) -> tuple[int, int]:
    spare = span.sequence.spare_slot
    return (spare, span.keep) if span.keep and spare is not None else (-1, 0)
