"""Native attention over a window and entries against float64, whatever the steps, the batch and the threads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from ktcore_cpu import _native
from ktcore_cpu.backend import CpuRuntime
from ktcore_cpu.compressed import CpuCompressedAttention

from ktcore.backend import LoadRequest
from ktcore.conformance.data.batches import Plan, batches, scattered
from ktcore.conformance.data.memory import make_weights, values
from ktcore.conformance.levels.specs_compressed import compressed
from ktcore.conformance.truth import compressed as truth
from ktcore.conformance.truth.arithmetic import EXACT
from ktcore.conformance.truth.small import rms_norm
from ktcore.errors import BackendError

PAGE, TOP_K = 16, 5
EXACTLY = {"activations": "f32", "kv_dtype": "f32"}
STEPS = ((150, 3, 17), (1, 1, 1), (70, 30, 1), (1, 2, 1))  # more tokens than are staged at once
KINDS: dict[str, dict[str, int]] = {"window": {}, "entries": {"ratio": 8}, "chosen": {"ratio": 4, "top_k": TOP_K}}


class Branch:
    """A branch with random weights on a pool of its own."""

    def __init__(self, kind: str, options: dict[str, Any], threads: int = 2) -> None:
        self.spec = compressed("F32", **KINDS[kind])
        self.runtime = CpuRuntime(threads)
        weights = make_weights(self.spec, np.random.default_rng(3))
        self.known = values(weights)
        request = LoadRequest("attn", self.spec, weights, self.runtime, self.runtime.capabilities(), options=options)
        self.module = CpuCompressedAttention().load(request)

    def run(self, inputs: Sequence[torch.Tensor], steps: Sequence[Sequence[int]] = STEPS) -> list[torch.Tensor]:
        plan = _placed(steps)
        self.module.allocate_pages(plan.pages, PAGE)
        self.module.allocate_states(len(inputs) + 1)
        out: list[list[torch.Tensor]] = [[] for _ in inputs]
        for step, rows in batches(plan):
            y = self.module(torch.cat([inputs[i][span] for i, span in rows]), step)
            for at, (i, span) in zip(step.q_start, rows, strict=False):
                out[i].append(y[at : at + span.stop - span.start])
        return [torch.cat(parts) for parts in out]

    def truth(self, x: torch.Tensor) -> torch.Tensor:
        choice = None
        if self.spec.indexer:
            assert self.spec.norm is not None
            n = rms_norm(self.spec.norm, self.known, x, EXACT, "norm.")
            low = truth.low_query(self.spec, self.known, n, EXACT)
            scores = truth.index_scores(self.spec.indexer, self.known, n, low, EXACT, "indexer.")
            choice = truth.best(scores, 4, TOP_K)
        return truth.attention(self.spec, self.known, x, EXACT, choice)


def _placed(steps: Sequence[Sequence[int]]) -> Plan:
    plan = scattered(steps, PAGE, np.random.default_rng(4))
    return replace(plan, slots=tuple(range(len(plan.tables), 0, -1)))


def _inputs() -> list[torch.Tensor]:
    rng = np.random.default_rng(5)
    lengths = [sum(step[i] for step in STEPS) for i in range(3)]
    return [torch.from_numpy(rng.standard_normal((n, 256), dtype=np.float32)) for n in lengths]


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_what_float64_says(isa: str, kind: str) -> None:
    branch, inputs = Branch(kind, EXACTLY), _inputs()
    for got, x in zip(branch.run(inputs), inputs, strict=True):
        off = (got.double() - branch.truth(x)).abs().amax(-1)
        # a choice between two entries that score alike may go either way
        assert off.median() < 1e-5
        assert (off > 1e-4).sum() <= (3 if kind == "chosen" else 0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("options", [EXACTLY, {}], ids=["exact", "default"])
def test_steps_company_and_threads_change_no_bit(kind: str, options: dict[str, Any]) -> None:
    inputs = _inputs()
    together = Branch(kind, options).run(inputs)
    alone = [Branch(kind, options, 1).run([x], _other_steps(len(x))) for x in inputs]
    for a, (b,) in zip(together, alone, strict=True):
        assert torch.equal(a, b)


def _other_steps(length: int) -> list[tuple[int]]:
    return [(70,), (1,), (length - 71,)] if length > 72 else [(1,)] * length


def test_a_slot_with_another_past_and_pages_that_were_not_given_are_refused() -> None:
    branch, x = Branch("chosen", EXACTLY), torch.randn(8, 256)
    plan = _placed(((4,), (4,)))
    branch.module.allocate_pages(plan.pages, PAGE)
    branch.module.allocate_states(3)
    (first, _), (second, _) = batches(plan)
    branch.module(x[:4], first)
    with pytest.raises(BackendError, match="holds the state after -1 tokens, 4 are needed"):
        branch.module(x[4:], replace(second, state_slots=(2,)))
    with pytest.raises(BackendError, match="state slot 7"):
        branch.module(x[4:], replace(second, state_slots=(7,)))
    with pytest.raises(BackendError, match="KV page"):
        branch.module(x[4:], replace(second, block_table=second.block_table * 0 + 99))


def test_memory_that_is_allocated_anew_keeps_the_other_kind() -> None:
    branch, x = Branch("chosen", EXACTLY), _inputs()[2]
    whole = branch.run([x], [(len(x),)])[0]
    plan = _placed(((9,), (len(x) - 9,)))
    branch.module.allocate_states(3)
    branch.module.allocate_pages(plan.pages, PAGE)
    (first, _), (second, _) = batches(plan)
    parts = [branch.module(x[:9], first)]
    pages = [tensor.clone() for tensor in branch.module.page_tensors()]
    states = [tensor.clone() for tensor in branch.module.state_tensors()]
    branch.module.allocate_pages(plan.pages, PAGE)
    for there, held in zip(branch.module.page_tensors(), pages, strict=True):
        there.copy_(held)
    assert all(torch.equal(a, b) for a, b in zip(branch.module.state_tensors(), states, strict=True))
    branch.module.allocate_states(3)
    for there, held in zip(branch.module.state_tensors(), states, strict=True):
        there.copy_(held)
    parts.append(branch.module(x[9:], second))
    assert torch.equal(torch.cat(parts), whole)


def test_arguments_that_do_not_fit_are_refused() -> None:
    pool = CpuRuntime(1).pool
    with pytest.raises(ValueError, match="a value a head"):
        _native.EntryAttention(pool, heads=4, dim=64, window=8, ratio=0, scale=1.0, sinks=np.zeros(3, np.float32))
    with pytest.raises(ValueError, match="was not allocated"):
        row = np.zeros((1, 64), np.float32)
        _native.store_rows(pool, row.ctypes.data, 1, 64, [5], row.ctypes.data, 5, "f32")
