"""Turns a plan into loaded modules: one pass over the checkpoint, node by node, parts before the whole."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from ktcore.backend.implementation import CacheOwner, LoadRequest, Module
from ktcore.backend.registry import Registry
from ktcore.engine.devices import Devices
from ktcore.engine.runner import LoadedModel
from ktcore.graph.node import Node
from ktcore.ops.moe import ExpertsSpec
from ktcore.rules.plan import Plan
from ktcore.weights.checkpoint import Checkpoint
from ktcore.weights.ref import Weight

Progress = Callable[[str, int, int], None]
"""Called with a node's name, the stored bytes loaded so far and those in all."""


def load_modules(
    plan: Plan,
    checkpoint: Checkpoint,
    registry: Registry,
    threads: int | None = None,
    progress: Progress | None = None,
    max_tokens: int = 512,
) -> LoadedModel:
    """Load every node of the plan with its chosen implementation.

    Args:
        max_tokens: most tokens of a step, which sizes the hand-off buffers.

    Raises:
        BackendError: a device that the plan uses is not available here, with the backend's own reason.
        CheckpointError: a tensor cannot be read.
    """
    loader = _Loader(plan, checkpoint, registry, threads, progress, max_tokens)
    graph = plan.graph
    try:
        model = LoadedModel(
            embed=loader.root(graph.embed),
            layers=tuple((loader.root(layer.attn), loader.root(layer.ffn)) for layer in graph.layers),
            norm=loader.root(graph.norm),
            head=loader.root(graph.head),
            sampler=loader.load(graph.sampler),
            caches=tuple(loader.caches),
            devices=loader.devices,
        )
        # weights were packed on the devices' own streams, steps run on the engine's
        loader.devices.synchronize()
        return model
    except BaseException:
        loader.devices.close()
        raise


class _Loader:
    def __init__(
        self,
        plan: Plan,
        checkpoint: Checkpoint,
        registry: Registry,
        threads: int | None,
        progress: Progress | None,
        max_tokens: int,
    ) -> None:
        self.plan = plan
        self.checkpoint = checkpoint
        self.registry = registry
        self.progress = progress
        self.max_tokens = max_tokens
        self.devices = Devices(lambda device: registry.runtime(device, threads=threads))
        self.caches: list[CacheOwner] = []
        self.total = sum(node.nbytes for node in plan.graph.roots())
        self.done = 0

    def root(self, node: Node) -> Module:
        """A top-level node; its input may come from another device than its own."""
        module = self.load(node)
        device = self.devices.runtime(self.plan.choices[node.name].device).device
        return module if len(self.plan.devices) == 1 and device.type == "cpu" else Arriving(module, device)

    def load(self, node: Node) -> Module:
        """A node with all of its parts."""
        choice = self.plan.choices[node.name]
        fused = choice.implementation.fused
        runtime = self.devices.runtime(choice.device)
        children = {} if fused else {role: self._child(part, choice.device) for role, part in node.parts.items()}
        refs = node.all_weights() if fused else dict(node.weights)
        weights = {role: ref.open(self.checkpoint) for role, ref in refs.items()}
        module = choice.implementation.load(
            LoadRequest(
                name=node.name,
                spec=node.spec,
                weights=weights,
                runtime=runtime,
                device=runtime.capabilities(),
                children=children,
                options=choice.options,
            )
        )
        if isinstance(module, CacheOwner):
            self.caches.append(module)
        self._loaded(node, weights)
        return module

    def _child(self, part: Node, parent_device: str) -> Module:
        module = self.load(part)
        device = self.plan.choices[part.name].device
        if device == parent_device:
            return module
        inside, outside = self.devices.runtime(device), self.devices.runtime(parent_device)
        if isinstance(part.spec, ExpertsSpec) and inside.device.type == "cpu":
            return self.devices.hand_off(module, parent_device, part.spec.hidden, part.spec.top_k, self.max_tokens)
        return Crossing(module, inside.device, outside.device)

    def _loaded(self, node: Node, weights: Mapping[str, Weight]) -> None:
        for weight in weights.values():
            self.done += weight.ref.nbytes
            weight.release()
        if self.progress is not None:
            self.progress(node.name, self.done, self.total)


class Arriving:
    """Calls a module after moving its tensor arguments to the module's device; the result stays there."""

    def __init__(self, module: Module, device: torch.device) -> None:
        self.module = module
        self.device = device

    def __call__(self, *args: Any) -> Any:
        return self.module(*(_move(a, self.device) for a in args))


class Crossing:
    """Calls a module that lives on another device: arguments go there, the result comes back, the host waits."""

    def __init__(self, module: Module, inside: torch.device, outside: torch.device) -> None:
        self.module = module
        self.inside = inside
        self.outside = outside

    def __call__(self, *args: Any) -> Any:
        return _move(self.module(*(_move(a, self.inside) for a in args)), self.outside)


def _move(value: Any, device: torch.device) -> Any:
    if isinstance(value, torch.Tensor):
        return value.to(device)
    if isinstance(value, tuple):
        return tuple(_move(v, device) for v in value)
    return value
