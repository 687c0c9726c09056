"""The native token indexer and attention over its choice, against float64 over what the weights are."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from ktcore_cpu import _native
from ktcore_cpu.backend import CpuRuntime
from ktcore_cpu.mla import CpuMLA, CpuMLAModule

from ktcore.backend import LoadRequest
from ktcore.conformance.data.batches import batches, scattered
from ktcore.conformance.data.memory import make_weights, values
from ktcore.conformance.levels.specs import mla, token_indexer, without_positions
from ktcore.conformance.truth import attention as truth
from ktcore.conformance.truth import indexer as index_truth
from ktcore.conformance.truth.arithmetic import EXACT
from ktcore.conformance.truth.small import rms_norm
from ktcore.ops import MLASpec

TOP_K, PAGE = 24, 16
EXACTLY = {"activations": "f32", "kv_dtype": "f32"}
STEPS = ((40, 3, 17), (1, 1, 1), (100, 30, 1), (1, 2, 1))
HEADS, DIM = 16, 64  # of the indexer; other widths go another way through the integer kernel
ODD = {"heads": 7, "dim": 40}


def _spec(heads: int = HEADS, dim: int = DIM, top_k: int = TOP_K) -> MLASpec:
    plain = mla(4, "F32", latent=64)
    cache = replace(plain.cache, chosen=True)
    return replace(plain, cache=cache, indexer=token_indexer(heads, dim, top_k, plain))


class Branch:
    """A branch with random weights on a pool of its own."""

    def __init__(self, spec: MLASpec, options: dict[str, Any], threads: int = 2) -> None:
        self.spec, self.runtime = spec, CpuRuntime(threads)
        weights = make_weights(spec, np.random.default_rng(3))
        self.known = values(weights)
        request = LoadRequest("attn", spec, weights, self.runtime, self.runtime.capabilities(), options=options)
        self.module = CpuMLA().load(request)
        self.choices: list[torch.Tensor] = []

    def run(self, inputs: Sequence[torch.Tensor], steps: Sequence[Sequence[int]] = STEPS) -> list[torch.Tensor]:
        """Each sequence's output; what its tokens chose is in `choices`."""
        plan = scattered(steps, PAGE, np.random.default_rng(4))
        self.module.allocate_pages(plan.pages, PAGE)
        out: list[list[torch.Tensor]] = [[] for _ in inputs]
        chosen: list[list[torch.Tensor]] = [[] for _ in inputs]
        for step, rows in batches(plan):
            y = self.module(torch.cat([inputs[i][span] for i, span in rows]), step)
            for at, (i, span) in zip(step.q_start, rows, strict=False):
                out[i].append(y[at : at + span.stop - span.start])
                chosen[i].append(step.handed_on()[at : at + span.stop - span.start])
        self.choices = [torch.cat(parts) for parts in chosen]
        return [torch.cat(parts) for parts in out]

    def scores(self, x: torch.Tensor) -> torch.Tensor:
        assert self.spec.norm is not None
        assert self.spec.indexer is not None
        n = rms_norm(self.spec.norm, self.known, x, EXACT, "norm.")
        low = truth.low_query(self.spec, self.known, n, EXACT)
        return index_truth.indexer_scores(self.spec.indexer, self.known, n, low, EXACT, "indexer.")


def _pooled(heads: int = HEADS, dim: int = DIM, pool: int = 4) -> MLASpec:
    plain = without_positions(mla(4, "F32", latent=64))
    cache = replace(plain.cache, chosen=True)
    return replace(plain, cache=cache, indexer=token_indexer(heads, dim, TOP_K, plain, pool=pool))


def _seen(branch: Branch, x: torch.Tensor, pool: int) -> torch.Tensor:
    """bool [L, L]: what each token attends to, by float64 scores."""
    scores, seen = branch.scores(x), torch.zeros(len(x), len(x), dtype=torch.bool)
    for t in range(len(x)):
        pools, tail = index_truth.pools_seen(scores, t, pool, TOP_K // pool)
        seen[t, [p * pool + i for p in pools for i in range(pool)] + tail] = True
    return seen


def _inputs(steps: Sequence[Sequence[int]] = STEPS) -> list[torch.Tensor]:
    rng = np.random.default_rng(5)
    lengths = [sum(step[i] for step in steps) for i in range(len(steps[0]))]
    return [torch.from_numpy(rng.standard_normal((n, 256), dtype=np.float32)) for n in lengths]


@pytest.mark.parametrize("shape", [{}, ODD], ids=["even", "odd"])
def test_sparse_attention_is_what_float64_says(isa: str, shape: dict[str, int]) -> None:
    branch, inputs = Branch(_spec(**shape), EXACTLY), _inputs()
    for got, x in zip(branch.run(inputs), inputs, strict=True):
        best = index_truth.best(branch.scores(x), TOP_K)
        torch.testing.assert_close(
            got.double(), truth.mla(branch.spec, branch.known, x, EXACT, best), atol=1e-4, rtol=0
        )


@pytest.mark.parametrize("pool", [4, 8])
@pytest.mark.parametrize("shape", [{}, ODD], ids=["even", "odd"])
def test_attention_over_pools_is_what_float64_says(isa: str, shape: dict[str, int], pool: int) -> None:
    branch, inputs = Branch(_pooled(**shape, pool=pool), EXACTLY), _inputs()
    for got, chosen, x in zip(branch.run(inputs), branch.choices, inputs, strict=True):
        seen = _seen(branch, x, pool)
        assert [[s for s in row if s >= 0] for row in chosen.tolist()] == [row.nonzero()[:, 0].tolist() for row in seen]
        torch.testing.assert_close(
            got.double(), truth.mla(branch.spec, branch.known, x, EXACT, seen), atol=1e-4, rtol=0
        )


@pytest.mark.parametrize("kind", ["i16", "f16", "bf16", "q8"])
def test_pools_stay_close_in_every_cache(isa: str, kind: str) -> None:
    branch, inputs = Branch(_pooled(32, 128), EXACTLY | {"kv_dtype": kind}), _inputs()
    branch.run(inputs)
    slack = {"i16": 1e-4, "f16": 2e-3, "bf16": 1e-2, "q8": 3e-2}[kind]
    for x, chosen in zip(inputs, branch.choices, strict=True):
        scores = branch.scores(x)
        for t, row in enumerate(chosen.tolist()):
            best, tail = index_truth.pools_seen(scores, t, 4, TOP_K // 4)
            count = 4 * len(best)
            pools = [s // 4 for s in row[:count:4]]
            assert row[: count + len(tail)] == [4 * p + i for p in pools for i in range(4)] + tail
            assert set(row[count + len(tail) :]) <= {-1}
            if pools:
                assert scores[t, best].min() - scores[t, pools].min() <= slack * scores.abs().max()


def test_pools_depend_neither_on_threads_nor_on_company_nor_on_steps(isa: str) -> None:
    inputs = _inputs()
    one, three = (Branch(_pooled(), {}, threads) for threads in (1, 3))
    for a, b in zip(one.run(inputs), three.run(inputs), strict=True):
        assert torch.equal(a, b)
    alone = Branch(_pooled(), {}, 2)
    for i, x in enumerate(inputs):
        alone.run([x], [(9,), (len(x) - 12,), (1,), (2,)])
        assert torch.equal(alone.choices[0], one.choices[i])


@pytest.mark.parametrize("kind", ["i16", "f16", "bf16", "q8"])
@pytest.mark.parametrize("shape", [{}, ODD, {"heads": 32, "dim": 128}], ids=["even", "odd", "wide"])
def test_what_is_chosen_scores_no_less_than_what_is_not(isa: str, shape: dict[str, int], kind: str) -> None:
    branch, inputs = Branch(_spec(**shape), EXACTLY | {"kv_dtype": kind}), _inputs()
    branch.run(inputs)
    slack = {"i16": 1e-4, "f16": 2e-3, "bf16": 1e-2, "q8": 2e-2}[kind]
    for x, chosen in zip(inputs, branch.choices, strict=True):
        scores = branch.scores(x)
        for t, row in enumerate(chosen.tolist()):
            count = min(t + 1, TOP_K)
            assert row[:count] == sorted(set(row[:count]))
            assert row[count:] == [-1] * (TOP_K - count)
            assert 0 <= row[0] <= row[count - 1] <= t
            least = scores[t, : t + 1].sort(descending=True).values[count - 1]
            assert least - scores[t, row[:count]].min() <= slack * scores.abs().max()


def test_results_depend_neither_on_threads_nor_on_company(isa: str) -> None:
    inputs = _inputs()
    one, three = (Branch(_spec(), {}, threads).run(inputs) for threads in (1, 3))
    alone = Branch(_spec(), {}, 2)
    for i, x in enumerate(inputs):
        assert torch.equal(one[i], three[i])
        assert torch.equal(one[i], alone.run([x], [(step[i],) for step in STEPS])[0])


@pytest.mark.parametrize("steps", [((40, 3), (1, 1), (87, 30)), ((150, 140), (1, 1))], ids=["absorbed", "expanded"])
def test_up_to_top_k_tokens_it_is_the_dense_branch_to_the_bit(isa: str, steps: Sequence[Sequence[int]]) -> None:
    inputs = _inputs(steps)
    sparse = Branch(_spec(top_k=160), {}).run(inputs, steps)
    spec = _spec()
    plain = replace(spec, indexer=None, cache=replace(spec.cache, chosen=False))
    runtime = CpuRuntime(2)
    weights = make_weights(spec, np.random.default_rng(3))
    request = LoadRequest("attn", plain, weights, runtime, runtime.capabilities(), options={})
    module = CpuMLA().load(request)
    plan = scattered(steps, PAGE, np.random.default_rng(4))
    module.allocate_pages(plan.pages, PAGE)
    out: list[list[torch.Tensor]] = [[] for _ in inputs]
    for step, rows in batches(plan):
        y = module(torch.cat([inputs[i][span] for i, span in rows]), step)
        for at, (i, span) in zip(step.q_start, rows, strict=False):
            out[i].append(y[at : at + span.stop - span.start])
    for a, b in zip(sparse, out, strict=True):
        assert torch.equal(a, torch.cat(b))


@pytest.mark.parametrize("wrong", [[0, 1, 40], [-1, -1, -1], [0, -7, -1]], ids=["later", "none", "negative"])
def test_a_choice_that_is_handed_on_is_checked(wrong: list[int]) -> None:
    spec = replace(_spec(), indexer=None, shared_index=True)
    weights = make_weights(spec, np.random.default_rng(3))
    runtime = CpuRuntime(2)
    module: CpuMLAModule = CpuMLA().load(
        LoadRequest("attn", spec, weights, runtime, runtime.capabilities(), options={})
    )
    plan = scattered(((30,),), PAGE, np.random.default_rng(4))
    module.allocate_pages(plan.pages, PAGE)
    ((step, _),) = batches(plan)
    choice = torch.tensor([[0, -1, -1]] * 29 + [wrong], dtype=torch.int32)
    step.hand_on(choice)
    with pytest.raises(ValueError, match="choice"):
        module(torch.randn(30, 256), step)


def _by_numpy(scores: np.ndarray, top_k: int) -> list[int]:
    chosen = sorted(np.argsort(-scores, kind="stable")[:top_k].tolist())
    return chosen + [-1] * (top_k - len(chosen))


@pytest.mark.parametrize("count", [1, 5, 64, 1000, 70_000])
@pytest.mark.parametrize("kind", ["normal", "ties", "equal", "tiny"])
def test_the_highest_are_chosen_and_of_equals_the_earlier(count: int, kind: str) -> None:
    rng = np.random.default_rng(count)
    make: dict[str, Callable[[], np.ndarray]] = {
        "normal": lambda: rng.standard_normal(count),
        "ties": lambda: rng.integers(-3, 4, count),
        "equal": lambda: np.full(count, -2.5),
        "tiny": lambda: rng.standard_normal(count) * 1e-40,
    }
    scores = make[kind]().astype(np.float32)
    for top_k in (1, 5, 63, 2048):
        assert _native.choose_highest(scores, top_k).tolist() == _by_numpy(scores, top_k)
