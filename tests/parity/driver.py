"""Runs a graph on the reference implementations, without rules or engine, over scattered KV pages."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate, pairwise
from typing import Any

import torch

from ktcore.backend.host import HostRuntime
from ktcore.backend.implementation import CacheOwner, Implementation, LoadRequest, StateOwner, Supported
from ktcore.backend.reference import reference_implementations
from ktcore.graph import Graph, Node, build_graph
from ktcore.ops import Spec, StepBatch
from ktcore.ops.moe import by_token
from ktcore.weights import Checkpoint

PAGE = 16
SEQUENCES, BLOCKS = 3, 8


class Runner:
    """Up to three sequences through a checkpoint; pages come in reverse order, so that page n is never block n.

    Args:
        options: of a rule, by operator.
        mutate: makes operators wrong on purpose.
        graph: None builds the checkpoint's.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        options: Mapping[type[Spec], Mapping[str, Any]] | None = None,
        mutate: Mapping[type[Spec], Callable[[Any], Spec]] | None = None,
        graph: Graph | None = None,
    ) -> None:
        self.graph: Graph = graph or build_graph(checkpoint)
        self._checkpoint = checkpoint
        self._options = options or {}
        self._mutate = mutate or {}
        self._runtime = HostRuntime()
        self._implementations: dict[type[Spec], Implementation] = {i.spec_type: i for i in reference_implementations()}
        self._caches: list[CacheOwner] = []
        self._states: list[StateOwner] = []
        self._modules = {node.name: self._load(node) for node in self.graph.roots()}
        self.reset()

    def reset(self) -> None:
        """Start new sequences."""
        self._lengths = [0] * SEQUENCES
        for cache in self._caches:
            cache.allocate_pages(SEQUENCES * BLOCKS, PAGE)
        for state in self._states:
            state.allocate_states(SEQUENCES)

    def __call__(self, ids: torch.Tensor) -> torch.Tensor:
        """Logits [tokens, vocab] of the sequence's next tokens."""
        return self.batch([ids])[0]

    @torch.no_grad()
    def batch(self, parts: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Logits [tokens, vocab] of the next tokens of sequence 0, 1, …, all in one step; a part may be any length."""
        starts = [0, *accumulate(len(part) for part in parts)]
        positions = torch.cat([torch.arange(n, n + len(part)) for n, part in zip(self._lengths, parts, strict=False)])
        for i, part in enumerate(parts):
            self._lengths[i] += len(part)
        table = torch.arange(SEQUENCES * BLOCKS - 1, -1, -1, dtype=torch.int32).view(SEQUENCES, BLOCKS)[: len(parts)]
        ids = torch.cat(list(parts))
        slots = tuple(range(SEQUENCES))[::-1][: len(parts)]
        step = StepBatch(ids, positions, tuple(starts), tuple(self._lengths[: len(parts)]), table, PAGE, slots)
        logits = self._forward(ids, step)
        return [logits[a:b] for a, b in pairwise(starts)]

    def _forward(self, ids: torch.Tensor, step: StepBatch) -> torch.Tensor:
        m = self._modules
        x = m["embed"](ids).repeat(1, self.graph.streams)
        for layer in self.graph.layers:
            early = getattr(layer.ffn.spec, "early_router", False)
            before = (x,) if early else (step,) if by_token(layer.ffn.spec) else ()
            x = m[layer.ffn.name](m[layer.attn.name](x, step), *before)
        logits: torch.Tensor = m["head"](m[self.graph.norm.name](x))
        return logits

    def _load(self, node: Node) -> Any:
        implementation = self._implementations[type(node.spec)]
        device = self._runtime.capabilities()
        assert isinstance(implementation.supports(node.spec, device), Supported)
        module = implementation.load(
            LoadRequest(
                name=node.name,
                spec=self._mutate.get(type(node.spec), lambda spec: spec)(node.spec),
                weights={role: ref.open(self._checkpoint) for role, ref in node.weights.items()},
                runtime=self._runtime,
                device=device,
                children={role: self._load(part) for role, part in node.parts.items()},
                options=self._options.get(type(node.spec), {}),
            )
        )
        if isinstance(module, CacheOwner):
            self._caches.append(module)
        if isinstance(module, StateOwner):
            self._states.append(module)
        return module
