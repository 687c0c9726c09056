"""Turns a plan into loaded modules: one pass over the checkpoint, node by node, parts before the whole."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch

from ktcore.backend.implementation import CacheOwner, ExpertLoad, Implementation, LoadRequest, Module, StateOwner
from ktcore.backend.record import describe
from ktcore.backend.registry import Registry
from ktcore.engine.experts.split import DeferralChain, DeferredExperts, ReducedRouter, SplitExperts
from ktcore.engine.load.read_ahead import ReadAhead
from ktcore.engine.load.room import room_for_weights
from ktcore.engine.step.decode_graph import graph_device
from ktcore.engine.step.devices import Devices
from ktcore.engine.step.runner import LoadedFurther, LoadedModel
from ktcore.errors import BackendError, KtcoreError
from ktcore.graph.node import FurtherLayer, Node
from ktcore.ops.base import Spec
from ktcore.ops.moe import ExpertsSpec, MoESpec, by_token
from ktcore.ops.ngram import NGramTableSpec
from ktcore.rules.plan import Plan
from ktcore.weights.checkpoint import Checkpoint
from ktcore.weights.packed.parts import PackedParts
from ktcore.weights.quantize import Loss
from ktcore.weights.ref import Weight, WeightRef

Progress = Callable[[str, int, int], None]
"""Called with a node's name, the stored bytes loaded so far and those in all."""


def load_modules(
    plan: Plan,
    checkpoint: Checkpoint,
    registry: Registry,
    threads: int | None = None,
    progress: Progress | None = None,
    max_tokens: int | None = None,
    packed: PackedParts | None = None,
    devices: Devices | None = None,
) -> LoadedModel:
    """Load every node of the plan with its chosen implementation.

    Args:
        max_tokens: most tokens of a step, which sizes the hand-off buffers; None: the plan's.
        packed: packed weights on disk, for the implementations that keep theirs there.
        devices: of another loaded model, to be shared with it; who owns them closes them.

    Raises:
        BackendError: a device that the plan uses is not available here, with the backend's own reason.
        CheckpointError: a tensor cannot be read.
    """
    graph = plan.graph
    most = plan.step_tokens if max_tokens is None else max_tokens
    # what is packed on disk already is not packed from the checkpoint, and the table is read row by row as tokens come
    stored = packed is not None and packed.complete
    if packed is not None:
        packed.populate(room_for_weights())
    wanted = [{} if stored or node is graph.embed else _read_whole(node) for node in graph.roots()]
    with ReadAhead(checkpoint, wanted) as ahead:
        return _loaded_model(_Loader(plan, checkpoint, registry, threads, progress, most, packed, ahead, devices))


def _loaded_model(loader: _Loader) -> LoadedModel:
    plan, graph = loader.plan, loader.plan.graph
    try:
        model = LoadedModel(
            embed=_in_streams(loader.root(graph.embed), graph.streams),
            layers=tuple((loader.root(layer.attn), loader.root(layer.ffn)) for layer in graph.layers),
            norm=loader.root(graph.norm),
            head=loader.root(graph.head),
            further=loader.further(graph.further),
            sampler=loader.load(graph.sampler),
            early=frozenset(
                i for i, layer in enumerate(graph.layers) if getattr(layer.ffn.spec, "early_router", False)
            ),
            told=frozenset(i for i, layer in enumerate(graph.layers) if by_token(layer.ffn.spec)),
            caches=tuple(loader.caches),
            states=tuple(loader.states),
            devices=loader.devices,
            deferred=loader.chain,
            losses=loader.losses,
            expert_loads=loader.expert_loads,
        )
        device, why_not = graph_device(plan, model.devices)
        model = replace(model, graph_device=device, no_graphs=why_not)
        # weights were packed on the devices' own streams, steps run on the engine's
        loader.devices.synchronize()
        return model
    except BaseException:
        if loader.owns_devices:
            loader.devices.close()
        raise


def _read_whole(node: Node) -> dict[str, WeightRef]:
    """What loading a node reads: of tables of n-grams, as of the embedding, single rows are read as tokens come."""
    parts = [part for part in node.walk() if not isinstance(part.spec, NGramTableSpec)]
    return {f"{part.name}.{role}": ref for part in parts for role, ref in part.weights.items()}


def _in_streams(embed: Module, streams: int) -> Module:
    """Embeddings as the first branch takes them: `streams` copies, one behind the other."""
    return embed if streams == 1 else lambda ids: embed(ids).repeat(1, streams)


class _Loader:
    def __init__(
        self,
        plan: Plan,
        checkpoint: Checkpoint,
        registry: Registry,
        threads: int | None,
        progress: Progress | None,
        max_tokens: int,
        packed: PackedParts | None,
        ahead: ReadAhead,
        devices: Devices | None = None,
    ) -> None:
        self.plan = plan
        self.checkpoint = checkpoint
        self.registry = registry
        self.progress = progress
        self.max_tokens = max_tokens
        self.packed = packed
        self.ahead = ahead
        self.owns_devices = devices is None
        self.devices = devices or Devices(lambda device: registry.runtime(device, threads=threads))
        self.caches: list[CacheOwner] = []
        self.states: list[StateOwner] = []
        self.total = sum(node.nbytes for node in plan.graph.roots())
        self.done = 0
        self.chain = DeferralChain()
        self.losses: dict[str, Loss] = {}
        self.expert_loads: dict[int, list[ExpertLoad]] = {}
        moe_layers = [
            layer.attn.layer
            for layer in plan.graph.layers
            if any(isinstance(node.spec, ExpertsSpec) for node in layer.ffn.walk())
        ]
        self.last_moe_layer = moe_layers[-1] if moe_layers else None

    def root(self, node: Node) -> Module:
        """A top-level node; its input may come from another device than its own."""
        self.ahead.next()
        module = self.load(node)
        device = self.devices.runtime(self.plan.choices[node.name].device).device
        return module if len(self.plan.devices) == 1 and device.type == "cpu" else Arriving(module, device)

    def further(self, layer: FurtherLayer | None) -> LoadedFurther | None:
        """The layer that predicts further tokens, where the graph has it."""
        if layer is None:
            return None
        embed, hidden, project, attention, ffn, norm = (self.root(node) for node in layer.roots())
        early = getattr(layer.layer.ffn.spec, "early_router", False)
        return LoadedFurther(embed, hidden, project, attention, ffn, norm, early)

    def load(self, node: Node) -> Module:
        """A node with all of its parts."""
        choice = self.plan.choices[node.name]
        fused = choice.implementation.fused
        children = {} if fused else {role: self._child(part, choice.device) for role, part in node.parts.items()}
        if isinstance(node.spec, MoESpec) and not fused:
            children["router"] = self._reduced(children["router"], node.parts["experts"])
        refs = node.all_weights() if fused else dict(node.weights)
        weights = {role: ref.open(self.checkpoint) for role, ref in refs.items()}
        module = self._module(node, choice.implementation, choice.device, node.spec, weights, children, choice.options)
        self._loaded(node, weights)
        return module

    def _module(
        self,
        node: Node,
        implementation: Implementation,
        device: str,
        spec: Spec,
        weights: Mapping[str, Weight],
        children: Mapping[str, Module],
        options: Mapping[str, Any],
    ) -> Module:
        runtime = self.devices.runtime(device)
        caps = runtime.capabilities()
        request = LoadRequest(node.name, spec, weights, runtime, caps, children, options, self.packed)
        try:
            module = implementation.load(request)
        except (KtcoreError, MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:
            # its supports() said that it could: a plugin's bug, which must name its plugin
            raise BackendError(
                f"{node.name}: {implementation.id} cannot load on {device}: {describe(error)}",
                f"tell the makers of the backend, and list another implementation before {implementation.id} in a rule",
            ) from error
        if isinstance(module, CacheOwner):
            self.caches.append(module)
        if isinstance(module, StateOwner):
            self.states.append(module)
        if isinstance(module, ExpertLoad) and node.layer is not None:
            self.expert_loads.setdefault(node.layer, []).append(module)
        return module

    def _child(self, part: Node, parent_device: str) -> Module:
        if isinstance(part.spec, ExpertsSpec):
            return self._experts(part, part.spec, parent_device)
        module = self.load(part)
        device = self.plan.choices[part.name].device
        if device == parent_device:
            return module
        return Crossing(module, self.devices.runtime(device).device, self.devices.runtime(parent_device).device)

    def _experts(self, node: Node, spec: ExpertsSpec, caller: str) -> Module:
        """Routed experts as their branch on `caller` sees them: handed off, split, deferred, as the plan says."""
        choice = self.plan.choices[node.name]
        resident = choice.resident.experts if choice.resident else ()
        others = [e for e in range(spec.experts) if e not in set(resident)]
        weights = {role: ref.open(self.checkpoint) for role, ref in node.weights.items()}
        far = near = None
        if others:
            held = weights if not resident else {role: w.subset(others) for role, w in weights.items()}
            left = replace(spec, experts=len(others))
            far = self._module(node, choice.implementation, choice.device, left, held, {}, choice.options)
        if choice.resident:
            held = {role: w.subset(resident) for role, w in weights.items()}
            kept = choice.resident
            near = self._module(node, kept.implementation, kept.device, kept.spec, held, {}, {})
            near = self._reached(near, kept.spec, kept.device, caller)
        self._loaded(node, weights)

        def one_caller() -> Module:
            reached = None if far is None else self._reached(far, spec, choice.device, caller)
            if near is None:
                return reached
            return SplitExperts(near, reached, resident, spec.experts, self.devices.runtime(caller).device)

        defer = choice.experts.defer if choice.experts else 0
        if not defer:
            return one_caller()
        return DeferredExperts(one_caller(), one_caller(), self.chain, defer, last=self._is_last(node))

    def _is_last(self, experts: Node) -> bool:
        """Whether no later layer of the same pass has experts; a layer behind the model's own is a pass by itself."""
        return self.last_moe_layer is None or (experts.layer or 0) >= self.last_moe_layer

    def _reached(self, module: Module, spec: ExpertsSpec, device: str, caller: str) -> Module:
        """Experts on `device` as a branch on `caller` calls them."""
        if device == caller:
            return module
        inside, outside = self.devices.runtime(device).device, self.devices.runtime(caller).device
        if inside.type == "cpu":
            return self.devices.hand_off(module, device, caller, spec.hidden, spec.top_k, self.max_tokens)
        return Crossing(module, inside, outside)

    def _reduced(self, router: Module, experts: Node) -> Module:
        policy = self.plan.choices[experts.name].experts
        if policy is None or not (policy.keep or policy.threshold):
            return router
        return ReducedRouter(router, policy.keep, policy.threshold)

    def _loaded(self, node: Node, weights: Mapping[str, Weight]) -> None:
        for role, weight in weights.items():
            self.done += weight.ref.nbytes
            if weight.ref.stored is not None:
                self.losses.setdefault(_owner(node, role).spec.op, Loss()).add(weight.loss)
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


def _owner(node: Node, role: str) -> Node:
    """The node itself, or the part of it that a dotted role ("shared.up.weight") leads to."""
    *path, _ = role.split(".")
    for step in path:
        node = node.parts[step]
    return node


def _move(value: Any, device: torch.device) -> Any:
    if isinstance(value, torch.Tensor):
        return value.to(device)
    if isinstance(value, tuple):
        return tuple(_move(v, device) for v in value)
    return value
