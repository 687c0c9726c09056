"""Index keys of tokens and of blocks, and their indexers, for the backend of these tests."""

from __future__ import annotations

from typing import Any

import torch

from ktcore.backend import LoadRequest
from ktcore.ops import BlockIndexCacheSpec, IndexCacheSpec, StepBatch
from ktcore.ops.block_indexer import choose_blocks, max_scores, mean_scores
from ktcore.ops.indexer import choose_tokens, index_scores, layer_norm
from ktcore.ops.kv_cache import sequence_slots
from ktcore.ops.pooled_index import choose_pools, pooled_keys


def weight(request: LoadRequest, role: str) -> torch.Tensor:
    return request.weights[role].tensor()


class Index:
    """Index keys as rows."""

    def __init__(self, spec: IndexCacheSpec) -> None:
        self.spec = spec

    def allocate_pages(self, pages: int, page_size: int) -> None:
        self.pages = pages
        self.keys, self.gates = (torch.zeros(pages * page_size, self.spec.dim) for _ in range(2))

    def page_tensors(self) -> tuple[torch.Tensor, ...]:
        return self.keys.view(self.pages, -1), self.gates.view(self.pages, -1)

    def append(self, step: StepBatch, keys: torch.Tensor, gates: torch.Tensor | float = 0.0) -> None:
        self.keys[step.slots()], self.gates[step.slots()] = keys, torch.as_tensor(gates)

    def choose(self, step: StepBatch, q: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        out, s = [], self.spec
        for span, slots in sequence_slots(step):
            if s.pool:
                keys = pooled_keys(self.keys[slots], self.gates[slots], s.pool)
                out.append(choose_pools(q[span], weights[span], keys, step.positions[span], len(slots), s))
                continue
            scores = self.scores(q[span], weights[span], self.keys[slots])
            out.append(choose_tokens(scores, step.positions[span], self.spec.top_k))
        return torch.cat(out)

    def scores(self, q: torch.Tensor, weights: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
        return index_scores(q, weights, keys)


def indexer(request: LoadRequest) -> Any:
    spec: Any = request.spec
    p = request.children
    w, b = weight(request, "k_norm"), weight(request, "k_norm_bias")

    def run(n: torch.Tensor, low: torch.Tensor, step: StepBatch) -> torch.Tensor:
        key = layer_norm(p["k"](n), w, b, spec.eps)
        q = p["q"](low).view(len(low), spec.heads, -1)
        if spec.rope:
            q, key = p["rope"](q, step.positions), p["rope"](key[:, None], step.positions)[:, 0]
        gates = (p["gate"](n) + weight(request, "ape")[step.positions % spec.cache.pool],) if spec.gate else ()
        p["cache"].append(step, key, *gates)
        return p["cache"].choose(step, q, p["weights"](n) * spec.scale)

    return run


class Blocks:
    """Index keys of tokens and blocks as rows."""

    def __init__(self, spec: BlockIndexCacheSpec) -> None:
        self.spec = spec

    def allocate_pages(self, pages: int, page_size: int) -> None:
        self.pages = pages
        self.keys, self.of_blocks = (torch.zeros(pages * page_size, self.spec.dim) for _ in range(2))

    def page_tensors(self) -> tuple[torch.Tensor, ...]:
        return self.keys.view(self.pages, -1), self.of_blocks.view(self.pages, -1)

    def append(self, step: StepBatch, keys: torch.Tensor) -> Any:
        self.keys[step.slots()] = keys
        if self.spec.pool == "max":
            return None
        means = []
        for span, slots in sequence_slots(step):
            back = torch.arange(self.spec.block)
            at = (step.positions[span, None] - back).clamp(min=0)
            means.append(self.keys[slots[at]].mean(1))
        return torch.cat(means)

    def complete(self, step: StepBatch, keys: torch.Tensor) -> None:
        ends = step.positions % self.spec.block == self.spec.block - 1
        self.of_blocks[step.slots()[ends]] = keys[ends]

    def choose(self, step: StepBatch, q: torch.Tensor) -> torch.Tensor:
        out, s = [], self.spec
        for span, slots in sequence_slots(step):
            at = step.positions[span]
            out.append(choose_blocks(self.scores(q[span], slots, at), at, len(slots), s))
        return torch.cat(out)

    def scores(self, q: torch.Tensor, slots: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
        if self.spec.pool == "max":
            return max_scores(q, self.keys[slots], at, self.spec.block)
        return mean_scores(q, self.of_blocks[slots[self.spec.block - 1 :: self.spec.block]])


def block_indexer(request: LoadRequest) -> Any:
    spec: Any = request.spec
    p = request.children

    def run(n: torch.Tensor, step: StepBatch) -> torch.Tensor:
        at = step.positions
        q = p["rope"](p["q_norm"](p["q"](n).view(len(n), spec.heads, -1)), at)
        k = p["k"](n)
        if spec.cache.pool == "mean":
            k = p["k_norm"](p["cache"].append(step, k))
            p["cache"].complete(step, p["rope"](k[:, None], at // spec.cache.block * spec.cache.block)[:, 0])
        else:
            p["cache"].append(step, p["rope"](p["k_norm"](k)[:, None], at)[:, 0])
        return p["cache"].choose(step, q)

    return run
