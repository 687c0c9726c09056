"""From a path to a plan, headers only: open the checkpoint, build its graph, find the backends, apply the rules."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from ktcore.backend.registry import Registry
from ktcore.errors import CheckpointError
from ktcore.graph.build import build_graph
from ktcore.graph.mixed import join_experts
from ktcore.graph.node import Graph
from ktcore.ops.moe import ExpertsSpec
from ktcore.rules.load import load_rules
from ktcore.rules.plan import Plan
from ktcore.rules.quantize import quantized_graph
from ktcore.rules.resolve import resolve
from ktcore.rules.taken import Taken, taken
from ktcore.weights.checkpoint import Checkpoint
from ktcore.weights.open import open_checkpoint
from ktcore.weights.packed.checkpoint import PackedCheckpoint
from ktcore.weights.packed.reader import PartReader
from ktcore.weights.quantize import target_format

LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class Prepared:
    """An open checkpoint with the plan made for it.

    Attributes:
        backend_reason: why this backend was taken.
        packed: the checkpoint's packed weights, where it is a folder that `ktcore convert` wrote.
    """

    checkpoint: Checkpoint
    registry: Registry
    plan: Plan
    backend_reason: str
    packed: PartReader | None = None

    @property
    def taken(self) -> Taken:
        """Which backend and devices, and why, in words (`str`)."""
        return taken(self.plan, self.backend_reason)


def prepare(
    path: Path,
    *,
    backend: str = "auto",
    rules: str | Path | None = None,
    memory: int | Mapping[str, int] | None = None,
    context: int | None = None,
    experts_from: Path | None = None,
    opener: Callable[[Path], Checkpoint] = open_checkpoint,
    quantize_experts: str | None = None,
    packing: str | None = None,
    further: bool = False,
) -> Prepared:
    """Plan a checkpoint without reading any tensor data; the caller closes `checkpoint`.

    Args:
        memory: bytes of accelerator memory that the plan must fit, or bytes by device.
        context: tokens that the KV cache must hold, for the memory figures.
        experts_from: another checkpoint of the same model, whose routed experts are taken.
        quantize_experts: format that float routed experts are quantised to ("int4_g128"), whatever the rules say.
        packing: "compact" or "fast" wherever the rules have no such option.
        further: take in the layer that predicts further tokens.
        opener: opens `path`; to plan without weights something else than usual.

    Raises:
        KtcoreError: of the kind that fits what is wrong.
    """
    checkpoint = opener(path)
    written = checkpoint if isinstance(checkpoint, PackedCheckpoint) else None
    others: Checkpoint | None = None if written is None else written.others
    try:
        if experts_from is not None:
            others = open_checkpoint(experts_from)
        if further and written is not None:
            raise CheckpointError(
                f"{path}: a converted model does not hold the layer that predicts further tokens",
                "load the model that it was made from",
            )
        if others is None:
            graph = build_graph(checkpoint, further=further)
        else:
            checkpoint, graph = join_experts(checkpoint, others, further=further)
        if written is not None:
            graph = quantized_graph(graph, written.quantized)
        if quantize_experts is not None:
            graph = _quantized_experts(graph, quantize_experts)
        registry = Registry.discover()
        name, reason = registry.choose(backend)
        plan = resolve(graph, load_rules(graph.family, name, rules, registry), registry, name, memory, context, packing)
        _tell(path, plan, reason)
        return Prepared(checkpoint, registry, plan, reason, None if written is None else written.parts)
    except BaseException:
        checkpoint.close()
        if others is not None:
            others.close()
        raise


def _tell(path: Path, plan: Plan, reason: str) -> None:
    graph = plan.graph
    shape = f"{graph.architecture}, {len(graph.layers)} layers"
    LOG.info("%s: %s, planned for %s (%s)", path, shape, plan.backend, reason)
    for name, choice in plan.choices.items():
        LOG.debug("%s: %s on %s", name, choice.implementation.id, choice.device)


def _quantized_experts(graph: Graph, fmt: str) -> Graph:
    target = target_format(fmt)
    return quantized_graph(graph, {n.name: target for n in graph.walk() if isinstance(n.spec, ExpertsSpec)})
