"""A checkpoint's graph, from its headers alone."""

from __future__ import annotations

from collections.abc import Mapping

from ktcore.errors import ArchitectureError
from ktcore.graph.architectures import GGUF_ARCHITECTURES, HF_ARCHITECTURES
from ktcore.graph.node import Graph
from ktcore.graph.settings import Settings
from ktcore.weights.checkpoint import Checkpoint


def build_graph(checkpoint: Checkpoint) -> Graph:
    """Operators, names and weight references of a model; reads no tensor data.

    Raises:
        ArchitectureError: the architecture is unknown, or configuration and tensors do not fit together.
        CheckpointError: a tensor is missing.
    """
    settings = Settings(checkpoint)
    known = GGUF_ARCHITECTURES if settings.gguf else HF_ARCHITECTURES
    build = known.get(settings.architecture)
    if build is None:
        raise ArchitectureError(
            f"{checkpoint.path}: architecture '{settings.architecture}' is not supported",
            f"supported in this kind of checkpoint: {', '.join(sorted(known))}",
        )
    if not settings.gguf and checkpoint.config.get("quantization_config"):
        quantised = checkpoint.config["quantization_config"]
        method = quantised.get("quant_method") if isinstance(quantised, Mapping) else quantised
        raise ArchitectureError(
            f"{checkpoint.path}: weights quantised with '{method}' are not supported",
            "use the bf16 weights or a GGUF file of the same model",
        )
    return build(settings)
