"""The option `quantize`: float weights of a node become groups of 4- or 8-bit integers while they are loaded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from ktcore.graph.node import Graph, Layer, Node
from ktcore.ops.base import Spec
from ktcore.ops.linear import LinearSpec
from ktcore.ops.moe import ExpertsSpec
from ktcore.weights.formats import get_format

OPTION = "quantize"
FLOATS = frozenset({"F64", "F32", "F16", "BF16", "F8_E4M3_G128", "F8_E4M3_G32"})
"""Formats that are quantised, with those whose columns are out of order; others are already, and stay."""
_FIELDS: Mapping[type[Spec], Mapping[str, str]] = {
    LinearSpec: {"weight": "weight_format"},
    ExpertsSpec: {"gate": "gate_format", "up": "up_format", "down": "down_format"},
}
"""Which weights are quantised: role -> field of the spec. Routers, norms, tables and biases stay as they are."""


def quantized_node(node: Node, fmt: str, *, with_parts: bool) -> Node:
    """The node with its float matrices in `fmt`; the same object when it has none.

    Args:
        with_parts: those of its parts too, as a fused implementation loads them.

    Raises:
        CheckpointError: rows that are no whole number of the format's groups.
    """
    fields = {} if _is_gate(node.spec) else _FIELDS.get(type(node.spec), {})
    chosen = {role: field for role, field in fields.items() if _is_quantised(node.weights[role].format)}
    if chosen:
        refs = {role: node.weights[role].quantized(fmt) for role in chosen}
        spec = replace(node.spec, **dict.fromkeys(chosen.values(), fmt))
        node = replace(node, weights={**node.weights, **refs}, spec=spec)
    if not with_parts:
        return node
    return with_new_parts(node, {role: quantized_node(part, fmt, with_parts=True) for role, part in node.parts.items()})


def quantized_graph(graph: Graph, formats: Mapping[str, str]) -> Graph:
    """The graph with the float matrices of the named nodes quantised: node name -> format."""
    nodes = {node.name: node for node in graph.walk() if node.name in formats}
    return with_new_nodes(
        graph, {name: quantized_node(node, formats[name], with_parts=False) for name, node in nodes.items()}
    )


def quantized_formats(graph: Graph) -> dict[str, str]:
    """Node name -> format of what a graph quantises while loading; `quantized_graph` does it again."""
    return {node.name: ref.format for node in graph.walk() for ref in node.weights.values() if ref.stored is not None}


def with_new_parts(node: Node, parts: Mapping[str, Node]) -> Node:
    """The node with other parts in the same roles, its spec made of theirs."""
    if all(parts[role] is part for role, part in node.parts.items()):
        return node
    specs: dict[str, Spec] = {role: part.spec for role, part in parts.items()}
    return replace(node, parts=dict(parts), spec=replace(node.spec, **specs))


def with_new_nodes(graph: Graph, nodes: Mapping[str, Node]) -> Graph:
    """The graph with each node that `nodes` names in its place, its parts included."""

    def new(node: Node) -> Node:
        if node.name in nodes:
            return nodes[node.name]
        return with_new_parts(node, {role: new(part) for role, part in node.parts.items()})

    layers = tuple(Layer(new(layer.attn), new(layer.ffn)) for layer in graph.layers)
    return replace(graph, embed=new(graph.embed), layers=layers, norm=new(graph.norm), head=new(graph.head))


def _is_quantised(fmt: str) -> bool:
    return fmt in FLOATS or get_format(fmt).ordered


def _is_gate(spec: Spec) -> bool:
    """A single row, such as the gate of shared experts: too small to matter, and all depends on it."""
    return isinstance(spec, LinearSpec) and spec.out_features == 1
