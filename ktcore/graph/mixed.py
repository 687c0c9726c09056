"""A model's graph with the routed experts of another checkpoint: FP8 attention with 1-bit experts, for instance."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from ktcore.errors import ArchitectureError
from ktcore.graph.build import build_graph
from ktcore.graph.node import Graph, Node
from ktcore.ops.moe import ExpertsSpec
from ktcore.weights.checkpoint import Checkpoint
from ktcore.weights.joined import JoinedCheckpoint, from_experts


@dataclass(frozen=True)
class OtherExperts:
    """Routed experts of another checkpoint by node name, their references as the joined checkpoint knows them."""

    checkpoint: Checkpoint
    nodes: Mapping[str, Node]

    def node(self, name: str, base: Checkpoint, hidden: int, intermediate: int, experts: int, top_k: int) -> Node:
        """The experts of a layer of `base`, held against what its configuration asks for.

        Raises:
            ArchitectureError: there are none, or of another shape; both checkpoints are named.
        """
        node = self.nodes.get(name)
        if node is None:
            raise self._differ(base, f"holds no '{name}'", "they may be different models, or differ in layers")
        spec = node.spec
        assert isinstance(spec, ExpertsSpec)
        found = f"{spec.experts} experts of width {spec.intermediate} on hidden size {spec.hidden}"
        asked = f"{experts} experts of width {intermediate} on hidden size {hidden}"
        if found != asked:
            raise self._differ(base, f"has {found} in '{name}', not {asked}", "they are different models")
        return replace(node, spec=replace(spec, top_k=top_k))

    def _differ(self, base: Checkpoint, what: str, hint: str) -> ArchitectureError:
        return ArchitectureError(f"{self.checkpoint.path} cannot give its experts to {base.path}: it {what}", hint)


def join_experts(base: Checkpoint, other: Checkpoint, *, further: bool = False) -> tuple[JoinedCheckpoint, Graph]:
    """`base`'s graph with the experts of `other`, and the checkpoint that both are read through.

    `base` need not hold experts; `other` must be a whole model of the same family. Their kinds may differ.

    Raises:
        ArchitectureError: they are not of the same model, or `other` has no routed experts; both are named.
        CheckpointError: a tensor is missing.
    """
    theirs = build_graph(other, further=further)
    nodes = {node.name: _renamed(node) for node in theirs.walk() if isinstance(node.spec, ExpertsSpec)}
    if not nodes:
        raise ArchitectureError(f"{other.path} has no routed experts to give to {base.path}")
    joined = JoinedCheckpoint(base, other)
    graph = build_graph(joined, OtherExperts(other, nodes), further=further)
    _check_same_model(graph, theirs, base, other)
    return joined, graph


def _renamed(node: Node) -> Node:
    return replace(node, weights={role: from_experts(ref) for role, ref in node.weights.items()})


def _check_same_model(ours: Graph, theirs: Graph, base: Checkpoint, other: Checkpoint) -> None:
    for what, a, b in (
        ("family", ours.family, theirs.family),
        ("layers", len(ours.layers), len(theirs.layers)),
        ("activation of experts", _activations(ours), _activations(theirs)),
        ("layers with experts", _expert_layers(ours), _expert_layers(theirs)),
    ):
        if a != b:
            raise ArchitectureError(
                f"{other.path} cannot give its experts to {base.path}: {what} differ, {b} and {a}",
                "give two checkpoints of the same model",
            )


def _activations(graph: Graph) -> list[str]:
    return sorted({node.spec.activation for node in graph.walk() if isinstance(node.spec, ExpertsSpec)})


def _expert_layers(graph: Graph) -> list[int | None]:
    return [node.layer for node in graph.walk() if isinstance(node.spec, ExpertsSpec)]
