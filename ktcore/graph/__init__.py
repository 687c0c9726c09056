"""What a model computes, from its checkpoint's headers: nodes with operator specs and weight references."""

from ktcore.graph.build import build_graph
from ktcore.graph.node import Graph, Layer, Node

__all__ = ["Graph", "Layer", "Node", "build_graph"]
