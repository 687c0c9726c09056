"""From a path to a plan, headers only: open the checkpoint, build its graph, find the backends, apply the rules."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ktcore.backend.registry import Registry
from ktcore.graph.build import build_graph
from ktcore.graph.mixed import join_experts
from ktcore.rules.load import load_rules
from ktcore.rules.plan import Plan
from ktcore.rules.resolve import resolve
from ktcore.weights.checkpoint import Checkpoint, open_checkpoint


@dataclass(frozen=True)
class Prepared:
    """An open checkpoint with the plan made for it.

    Attributes:
        backend_reason: why this backend was taken.
    """

    checkpoint: Checkpoint
    registry: Registry
    plan: Plan
    backend_reason: str


def prepare(
    path: Path,
    *,
    backend: str = "auto",
    rules: str | Path | None = None,
    memory: int | None = None,
    context: int | None = None,
    experts_from: Path | None = None,
    opener: Callable[[Path], Checkpoint] = open_checkpoint,
) -> Prepared:
    """Plan a checkpoint without reading any tensor data; the caller closes `checkpoint`.

    Args:
        memory: bytes of accelerator memory that the plan must fit.
        context: tokens that the KV cache must hold, for the memory figures.
        experts_from: another checkpoint of the same model, whose routed experts are taken.
        opener: opens `path`; to plan without weights something else than usual.

    Raises:
        KtcoreError: of the kind that fits what is wrong.
    """
    checkpoint = opener(path)
    others = None
    try:
        if experts_from is None:
            graph = build_graph(checkpoint)
        else:
            others = open_checkpoint(experts_from)
            checkpoint, graph = join_experts(checkpoint, others)
        registry = Registry.discover()
        name, reason = registry.choose(backend)
        plan = resolve(graph, load_rules(graph.family, name, rules, registry), registry, name, memory, context)
        return Prepared(checkpoint, registry, plan, reason)
    except BaseException:
        checkpoint.close()
        if others is not None:
            others.close()
        raise
