"""A checkpoint's graph, from its headers alone."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ktcore.errors import ArchitectureError
from ktcore.graph.complete import check_formats, check_settings, check_tensors
from ktcore.graph.families import GGUF_ARCHITECTURES, HF_ARCHITECTURES
from ktcore.graph.further import no_further
from ktcore.graph.node import Graph
from ktcore.graph.settings import Settings
from ktcore.graph.wrappers import WRAPPERS
from ktcore.weights.checkpoint import Checkpoint

if TYPE_CHECKING:
    from ktcore.graph.mixed import OtherExperts


def build_graph(checkpoint: Checkpoint, experts: OtherExperts | None = None, *, further: bool = False) -> Graph:
    """Operators, names and weight references of a model; reads no tensor data.

    Args:
        experts: routed experts to take instead of the checkpoint's own (`ktcore.graph.mixed`).
        further: take in the layer that predicts further tokens (`Graph.further`).

    Raises:
        ArchitectureError: the architecture is unknown, or configuration and tensors do not fit together: a tensor of
            another shape, one that nothing would use, a setting that is not supported.
        CheckpointError: a tensor is missing, or in a format that nothing can read.
    """
    settings = Settings(checkpoint, experts=experts, further=further)
    known = GGUF_ARCHITECTURES if settings.gguf else HF_ARCHITECTURES
    build = known.get(settings.architecture)
    if build is None:
        names = sorted({*known, *(() if settings.gguf else WRAPPERS)})
        raise ArchitectureError(
            f"{checkpoint.path}: architecture '{settings.architecture}' is not supported",
            f"supported in this kind of checkpoint: {', '.join(names)}",
        )
    check_settings(settings)
    graph = build(settings)
    if further and graph.further is None:
        raise no_further(settings)
    check_tensors(settings, graph)
    check_formats(settings, graph)
    return graph
