"""What several families of experts say alike: the router's function in GGUF files, and which layers are dense."""

from __future__ import annotations

from ktcore.graph.maker import NodeMaker
from ktcore.graph.settings import Settings

SOFTMAX, SIGMOID = 1, 2  # `expert_gating_func` in GGUF


def is_sigmoid(s: Settings) -> bool:
    """Of a GGUF file; ArchitectureError for a function that is neither, 0 counts as absent."""
    function = s.integer("", "expert_gating_func", least=0) or s.defaults.gguf["expert_gating_func"]
    if function not in (SOFTMAX, SIGMOID):
        raise s.error(f"expert_gating_func {function} is unknown", "known: 1 (softmax), 2 (sigmoid)")
    return bool(function == SIGMOID)


def is_dense(make: NodeMaker, name: str, layer: int) -> bool:
    """Whether a layer has no experts: by `mlp_layer_types`, of which the usual is the first alone; GGUF's tensors tell.

    Raises:
        ArchitectureError: no word for the layer, or an unknown one.
    """
    s = make.settings
    if s.gguf:
        return not make.has(f"{name}.router")
    if layer >= s.layers():
        return False  # it predicts further tokens: lists do not tell of it
    kinds = s.sequence("mlp_layer_types")
    if not kinds:
        return layer == 0
    kind = kinds[layer] if layer < len(kinds) else None
    if kind not in ("dense", "sparse"):
        raise s.error(f"mlp_layer_types says {kind!r} of layer {layer}", "known: dense, sparse")
    return bool(kind == "dense")
