"""Nodes and the graph: operator specs with names and weight references, known from headers alone."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from ktcore.ops.base import Spec
from ktcore.weights.ref import WeightRef


@dataclass(frozen=True)
class Node:
    """One operator of a model.

    Attributes:
        name: dotted path such as "layers.3.ffn.experts"; unique in the graph.
        spec: what it computes.
        weights: role -> reference of the weights that are this node's own (those of its parts are theirs).
        parts: role -> node for every operator inside a composite, matching `spec.children()`.
        layer: index of the decoder layer; None outside of layers.
    """

    name: str
    spec: Spec
    weights: Mapping[str, WeightRef] = field(default_factory=dict)
    parts: Mapping[str, Node] = field(default_factory=dict)
    layer: int | None = None

    def __post_init__(self) -> None:
        expected, given = set(self.spec.children()), set(self.parts)
        if expected != given:
            raise ValueError(f"node {self.name}: parts {sorted(given)} do not match its spec's {sorted(expected)}")

    def walk(self) -> Iterator[Node]:
        """This node, then all parts, depth first."""
        yield self
        for part in self.parts.values():
            yield from part.walk()

    def all_weights(self, prefix: str = "") -> dict[str, WeightRef]:
        """Own weights and those of all parts by dotted role ("q.weight"), for implementations that load the whole."""
        found = {prefix + role: ref for role, ref in self.weights.items()}
        for role, part in self.parts.items():
            found.update(part.all_weights(f"{prefix}{role}."))
        return found

    @property
    def nbytes(self) -> int:
        """Stored bytes of this node's weights and its parts'."""
        return sum(ref.nbytes for ref in self.all_weights().values())


@dataclass(frozen=True)
class Layer:
    """A decoder layer: two residual branches, attention first."""

    attn: Node
    ffn: Node


@dataclass(frozen=True)
class FurtherLayer:
    """A layer that predicts one token further than the model does (DeepSeek-V3, arXiv 2412.19437, section 2.2).

    With h, the last hidden state of a token, and e, the embedding of the token behind it:
    y = norm(layer(project([embed_norm(e); hidden_norm(norm of the model(h))]))); head of the model(y) are the logits of
    the token after that, and y stands for h when the next one is predicted.

    Attributes:
        embed_norm, hidden_norm, project, norm: roots of the graph, as the layer's two branches are.
    """

    embed_norm: Node
    hidden_norm: Node
    project: Node
    layer: Layer
    norm: Node

    def roots(self) -> Iterator[Node]:
        """Its nodes in the order they run."""
        yield from (self.embed_norm, self.hidden_norm, self.project, self.layer.attn, self.layer.ffn, self.norm)


@dataclass(frozen=True)
class Graph:
    """A whole model: x = embed(ids); x = ffn(attn(x)) a layer; logits = head(norm(x)).

    Attributes:
        streams: residual streams: embeddings [T, hidden] are copied to [T, streams * hidden], stream by stream, and
            the branches (`StreamBranchSpec`) hand on all of them to `norm` (`StreamEndSpec`).
        architecture: the family's name as in the checkpoint ("llama", "deepseek2", "qwen3_moe" …).
        family: name of the base rule file ("llama", "qwen3_moe", "deepseek_v3").
        context_length: longest context the model was made for, in tokens.
        read: tensors whose values are in specs already.
        left_out: beginnings of tensors' names -> the part of the checkpoint that they belong to and that is not run.
        further: the layer that predicts further tokens, where drafts are wanted of it; else such layers are left out.
    """

    architecture: str
    family: str
    hidden: int
    vocab: int
    context_length: int
    embed: Node
    layers: tuple[Layer, ...]
    norm: Node
    head: Node
    sampler: Node
    left_out: Mapping[str, str] = field(default_factory=dict)
    streams: int = 1
    further: FurtherLayer | None = None
    read: tuple[str, ...] = ()

    def roots(self) -> Iterator[Node]:
        """Top-level nodes in the order they run."""
        yield self.embed
        for layer in self.layers:
            yield layer.attn
            yield layer.ffn
        yield self.norm
        yield self.head
        if self.further is not None:
            yield from self.further.roots()
        yield self.sampler

    def walk(self) -> Iterator[Node]:
        """Every node, composites before their parts."""
        for root in self.roots():
            yield from root.walk()

    @property
    def parameters(self) -> int:
        """Number of weights, those of a tied head once."""
        refs = {ref for root in self.roots() for ref in root.all_weights().values()}
        return sum(math.prod(ref.shape) for ref in refs)

    def node(self, name: str) -> Node:
        """The node of that name; KeyError when there is none."""
        for node in self.walk():
            if node.name == name:
                return node
        raise KeyError(name)
