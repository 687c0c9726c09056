"""Native Kimi delta attention against the fp64 recurrence: chunks, single tokens, both decays, company and threads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from ktcore_cpu.backend import CpuRuntime
from ktcore_cpu.kda import CpuKimiDelta

from ktcore.backend import LoadRequest
from ktcore.conformance.data.batches import batches, scattered
from ktcore.conformance.data.memory import MemoryCheckpoint, make_weights, values
from ktcore.conformance.levels.specs import kimi_delta
from ktcore.conformance.truth.arithmetic import EXACT
from ktcore.conformance.truth.kda import kimi_delta as truth
from ktcore.errors import BackendError
from ktcore.ops import KimiDeltaSpec

EXACTLY = {"activations": "f32"}
# prompts of all sizes, decode beside a prompt, fewer tokens than the convolution is wide
STEPS = ((40, 1, 2), (1, 37, 1), (3, 5, 2), (2, 1, 18))
SHAPES: dict[str, dict[str, Any]] = {
    "softplus": {"heads": 3, "dim": 32},
    "bounded": {"heads": 2, "dim": 80, "lower_bound": -5.0, "decay_log": True},
    "wide": {"heads": 2, "dim": 128, "lower_bound": -5.0, "width": 3},
}


class Branch:
    """A branch with random weights on a pool of its own."""

    def __init__(self, spec: KimiDeltaSpec, options: dict[str, Any], threads: int = 2, rates: float = 1.0) -> None:
        self.spec, runtime = spec, CpuRuntime(threads)
        weights = make_weights(spec, np.random.default_rng(3))
        self.known = values(weights)
        if rates != 1.0:
            held = rates * weights["decay"].tensor().numpy()
            weights["decay"] = MemoryCheckpoint().add("decay", held.shape, "F32", held.view(np.uint8))
            self.known = values(weights)
        request = LoadRequest("attn", spec, weights, runtime, runtime.capabilities(), options=options)
        self.module = CpuKimiDelta().load(request)

    def run(self, inputs: Sequence[torch.Tensor], steps: Sequence[Sequence[int]] = STEPS) -> list[torch.Tensor]:
        """Each sequence's output."""
        plan = scattered(steps, 16, np.random.default_rng(4))
        slots = tuple(np.random.default_rng(6).permutation(len(inputs) + 2).tolist())
        self.module.allocate_states(len(slots))
        plan = replace(plan, slots=slots[: len(inputs)])
        out: list[list[torch.Tensor]] = [[] for _ in inputs]
        for step, rows in batches(plan):
            y = self.module(torch.cat([inputs[i][span] for i, span in rows]), step)
            for at, (i, span) in zip(step.q_start, rows, strict=False):
                out[i].append(y[at : at + span.stop - span.start])
        return [torch.cat(parts) for parts in out]


def _inputs(steps: Sequence[Sequence[int]] = STEPS) -> list[torch.Tensor]:
    rng = np.random.default_rng(5)
    lengths = [sum(step[i] for step in steps) for i in range(len(steps[0]))]
    return [torch.from_numpy(rng.standard_normal((n, 256), dtype=np.float32)) for n in lengths]


@pytest.mark.parametrize("shape", SHAPES)
def test_ragged_steps_are_what_float64_says(isa: str, shape: str) -> None:
    branch, inputs = Branch(kimi_delta(**SHAPES[shape]), EXACTLY), _inputs()
    for got, x in zip(branch.run(inputs), inputs, strict=True):
        want = truth(branch.spec, branch.known, x, EXACT)
        torch.testing.assert_close(got.double(), want, atol=5e-5, rtol=0)


@pytest.mark.parametrize("bound", [None, -5.0])
def test_the_strongest_decays_overflow_nowhere(isa: str, bound: float | None) -> None:
    """Rates of 40: a chunk's decays multiply to far below the least float, or to e^-80."""
    branch, inputs = Branch(kimi_delta(2, 32, lower_bound=bound), EXACTLY, rates=40.0), _inputs()
    for got, x in zip(branch.run(inputs), inputs, strict=True):
        want = truth(branch.spec, branch.known, x, EXACT)
        torch.testing.assert_close(got.double(), want, atol=5e-5, rtol=0)


def test_results_depend_neither_on_threads_nor_on_company(isa: str) -> None:
    spec, inputs = kimi_delta(3, 32, "Q8_0", lower_bound=-5.0), _inputs()
    one, three = (Branch(spec, {}, threads).run(inputs) for threads in (1, 3))
    alone = Branch(spec, {}, 2)
    for i, x in enumerate(inputs):
        assert torch.equal(one[i], three[i])
        (by_itself,) = alone.run([x], [(step[i],) for step in STEPS])
        assert torch.equal(one[i], by_itself)


def test_quantised_weights_stay_close() -> None:
    branch, inputs = Branch(kimi_delta(3, 32, "Q8_0"), {}), _inputs()
    for got, x in zip(branch.run(inputs), inputs, strict=True):
        want = truth(branch.spec, branch.known, x, EXACT)
        error = (got.double() - want).pow(2).mean().sqrt() / (want - x).pow(2).mean().sqrt()
        assert error < 0.05


def test_a_slot_of_other_tokens_is_refused() -> None:
    branch, inputs = Branch(kimi_delta(2, 32), {}), _inputs()
    plan = replace(scattered(((5,), (1,)), 16, np.random.default_rng(4)), slots=(0,))
    branch.module.allocate_states(2)
    (first, _), (second, _) = batches(plan)
    branch.module(inputs[0][:5], first)
    with pytest.raises(BackendError, match="slot 1 holds the state"):
        branch.module(inputs[0][5:6], replace(second, state_slots=(1,)))
