"""Backends that are wrong where little is left: logits that are no numbers, pages of others, experts at -inf, columns
in another order."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ktcore.backend import LoadRequest
from ktcore.ops import ExpertsSpec, RouterSpec, SamplingSpec, StepBatch
from ktcore.ops.moe import routed_experts
from ktcore.weights import dequantize

from . import plain
from .mutants import Maker, cache, named
from .plain import Cache, weight


def greedy_goes_on(request: LoadRequest) -> Any:
    """What is not a number counts as the least."""
    run = plain.sampling(request)
    return lambda logits, *rest: run(logits.nan_to_num(-100.0, 100.0), *rest)


class WholePages(Cache):
    """Attends over every row of a sequence's pages: those beyond its context get a weight of zero."""

    def attend(self, step: StepBatch, q: torch.Tensor, scale: float, sinks: Any = None) -> torch.Tensor:
        out, size, share = [], step.page_size, self.spec.heads // self.spec.kv_heads
        for i in range(step.sequences):
            pages = step.block_table[i].long()[: -(-step.context_lens[i] // size)]
            rows = (pages[:, None] * size + torch.arange(size)).flatten()
            span = slice(step.q_start[i], step.q_start[i + 1])
            k, v = (held[rows].repeat_interleave(share, 1) for held in (self.k, self.v))
            scores = torch.einsum("qhd,khd->hqk", q[span], k) * scale
            hidden = torch.arange(len(rows))[None] > step.positions[span][:, None]
            weights = scores.masked_fill(hidden, -torch.inf).softmax(-1)
            out.append(torch.einsum("hqk,khd->qhd", weights, v))
        return torch.cat(out)


def chosen_again(request: LoadRequest) -> Any:
    """Marks a chosen expert by -inf, which the experts that nobody may choose have too."""
    run, bias = plain.router(request), None
    spec: Any = request.spec
    if not (spec.choice_bias or spec.logit_bias) or spec.groups > 1:
        return run
    w, bias = weight(request, "weight"), weight(request, "logit_bias" if spec.logit_bias else "bias")

    def route_by_marks(x: torch.Tensor) -> Any:
        logits = x @ w.T
        choice = logits + bias if spec.on_logits else logits.sigmoid() + bias
        _, right = run(x)
        ids = []
        for _ in range(spec.top_k):
            ids.append(choice.argmax(-1))
            choice = choice.scatter(1, ids[-1][:, None], -torch.inf)
        return torch.stack(ids, 1), right

    return route_by_marks


def experts_in_place(make_order: Callable[[Any], Any]) -> Maker:
    """Ordered experts whose columns stay as `make_order` of the weight says."""

    def make(request: LoadRequest) -> Any:
        spec: Any = request.spec
        held = {role: request.weights[role] for role in ("gate", "up", "down")}
        gate, up, down = (make_order(w) if w.format.endswith("_ORDERED") else w.tensor() for w in held.values())
        return lambda x, ids, weights: routed_experts(x, ids, weights, gate, up, down, spec)

    return make


def as_stored(w: Any) -> torch.Tensor:
    return torch.stack([dequantize(w.format, w.part(e).raw().reshape(-1), w.shape[1:]) for e in range(w.shape[0])])


def by_first(w: Any) -> torch.Tensor:
    """The first expert's order for all."""
    return torch.empty(w.shape).index_copy_(2, torch.from_numpy(w.part(0).input_order), as_stored(w))


LEFTOVERS = [
    named("greedy goes on over NaN", "L2.sampling.not-a-number", {SamplingSpec: greedy_goes_on}),
    named("rows beyond the context times zero", "L2.nonfinite.kv_cache.gqa.freed-pages", cache(WholePages)),
    named("the same in attention", "L2.nonfinite.attention.freed-pages", cache(WholePages)),
    named("the same of latents", "L2.nonfinite.mla.freed-pages", cache(WholePages)),
    named("an expert chosen twice", "L2.router.nothing-left.experts", {RouterSpec: chosen_again}),
    named("an expert chosen twice by logits", "L3.router.nothing-left-on-logits", {RouterSpec: chosen_again}),
    named("experts' columns as they are stored", "L3.experts.ordered", {ExpertsSpec: experts_in_place(as_stored)}),
    named("the first expert's order for all", "L3.experts.ordered", {ExpertsSpec: experts_in_place(by_first)}),
]
