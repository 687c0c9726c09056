"""Makes the nodes that all families share; weight formats come from the tensors' headers, shapes are checked."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ktcore.errors import ArchitectureError
from ktcore.graph.defaults import ALWAYS
from ktcore.graph.names import FURTHER, NameTable, TensorNames, layer_of
from ktcore.graph.node import Node
from ktcore.graph.settings import Settings
from ktcore.ops.base import Spec
from ktcore.ops.linear import LinearSpec
from ktcore.ops.mlp import ACTIVATIONS, ClampedGLU, MLPSpec
from ktcore.ops.norm import RMSNormSpec
from ktcore.weights.ref import RowSlice, WeightRef


class NodeMaker:
    """Node names are "layers.0.attn.q"; the tensors behind them come from the family's name table.

    Args:
        norm_offset: added to the weights of norms, 1 where checkpoints hold them zero-centred.
        model: in front of the tensors' names in hub folders, where they are no part of something larger.
    """

    def __init__(
        self, settings: Settings, layer_table: NameTable, *, norm_offset: float = 0.0, model: str = "model."
    ) -> None:
        self.settings = settings
        whole = settings.wrapper
        where = (whole.model, whole.head) if whole else (model,)
        self.names = TensorNames(settings.gguf, {**FURTHER, **layer_table}, *where)
        self.norm_offset = norm_offset
        self.read: list[str] = []

    @property
    def plain_suffix(self) -> str:
        """Behind the names of parameters that are no module's weight: hub folders have none, GGUF files ".weight"."""
        return ".weight" if self.settings.gguf else ""

    def has(self, name: str, suffix: str = ".weight") -> bool:
        """Whether the checkpoint holds the tensor of a node."""
        return self.names.knows(name) and self.settings.checkpoint.holds(self.names.of(name) + suffix)

    def biased(self, name: str) -> bool:
        """Whether a projection has a bias: the tensors tell, and where there are none the configuration."""
        settings = self.settings
        if not settings.checkpoint.weightless:
            return self.has(name, ".bias")
        key = settings.defaults.biases.get(name.rsplit(".", 1)[-1])
        return key == ALWAYS or (key is not None and settings.flag(key, ""))

    def ref(self, name: str, shape: tuple[int, ...], suffix: str = ".weight", *, fold: bool = False) -> WeightRef:
        """The weight of a node.

        Args:
            shape: what the configuration asks for.
            fold: leading axes may be folded into one or split up in the file, and axes of 1 be anywhere.

        Raises:
            CheckpointError: the tensor is missing.
            ArchitectureError: it has another shape than the configuration says.
        """
        tensor = self.names.of(name) + suffix
        self.settings.checkpoint.expect(tensor, shape)
        ref = WeightRef.of(self.settings.checkpoint, tensor)
        last = ref.shape[-1:] == shape[-1:] or [n for n in ref.shape if n > 1] == [n for n in shape if n > 1]
        folded = fold and last and math.prod(ref.shape) == math.prod(shape)
        if not folded:
            self.check(tensor, ref.shape, shape)
        return WeightRef.of(self.settings.checkpoint, tensor, shape=shape)

    def stack(self, name: str, count: int, shape: tuple[int, ...], suffix: str = ".weight") -> WeightRef:
        """`count` tensors of `shape` as one [count, *shape] weight: stored as one tensor, or as one an expert."""
        pattern = self.names.of(name)
        if "{}" not in pattern:
            return self.ref(name, (count, *shape), suffix)
        names = []
        for e in range(count):
            names.append(pattern.format(e) + suffix)
            self.settings.checkpoint.expect(names[-1], shape)
        ref = WeightRef.of(self.settings.checkpoint, *names)
        self.check(names[0], ref.shape[1:], shape)
        return ref

    def constants(self, name: str, count: int) -> tuple[int, ...]:
        """Whole numbers that a checkpoint holds as a small tensor: they say what is computed, so they are read here.

        Raises:
            CheckpointError: the tensor is missing.
            ArchitectureError: it has another length, or is not made of 64-bit integers.
        """
        tensor = self.names.of(name)
        ref = self.ref(name, (count,), "")
        if ref.format != "I64":
            raise self.settings.error(f"tensor '{tensor}' is {ref.format}, 64-bit integers are needed")
        self.read.append(tensor)
        return tuple(self.settings.checkpoint.raw(tensor).view("<i8").tolist())

    def check(self, tensor: str, found: tuple[int, ...], expected: tuple[int, ...]) -> None:
        """ArchitectureError when a tensor's shape is not what the configuration says."""
        if found != expected:
            raise ArchitectureError(
                f"{self.settings.checkpoint.file_of(tensor)}: tensor '{tensor}' has shape {list(found)}, but the "
                f"configuration asks for {list(expected)}",
                "the configuration and the weights belong to different models, or one of them was edited",
            )

    def node(self, name: str, spec: Spec, weights: Mapping[str, WeightRef] | None = None) -> Node:
        """A node without parts; its layer is taken from its name."""
        return Node(name, spec, weights or {}, {}, layer_of(name))

    def composite(
        self,
        name: str,
        make_spec: Callable[..., Spec],
        parts: Mapping[str, Node | None],
        weights: Mapping[str, WeightRef] | None = None,
        **fields: Any,
    ) -> Node:
        """A node with parts (None where there is none); its spec is `make_spec` of the parts' specs and `fields`."""
        present = {role: part for role, part in parts.items() if part is not None}
        spec = make_spec(**fields, **{role: part.spec for role, part in present.items()})
        return Node(name, spec, weights or {}, present, layer_of(name))

    def linear(self, name: str, in_features: int, out_features: int, *, plain: bool = False) -> Node:
        """A projection; its bias is used when the checkpoint holds one, unless it is `plain`."""
        weight = self.ref(name, (out_features, in_features))
        weights = {"weight": weight}
        if not plain and self.biased(name):
            weights["bias"] = self.ref(name, (out_features,), ".bias")
        return self.node(name, LinearSpec(in_features, out_features, weight.format, "bias" in weights), weights)

    def row_span(self, name: str, whole: str, in_features: int, span: tuple[int, int], rows: int) -> Node:
        """A projection that is stored as rows `span` of the tensor `whole`, which has `rows` of them."""
        return self.picked(name, whole, in_features, [(*span, 1)], rows)

    def picked(self, name: str, whole: str, in_features: int, slices: Sequence[RowSlice], rows: int) -> Node:
        """A projection that is stored as several slices of the rows of the tensor `whole`, one after another."""
        weight = self.ref(whole, (rows, in_features)).pick_rows(*slices)
        weights = {"weight": weight}
        if self.biased(whole):
            weights["bias"] = self.ref(whole, (rows,), ".bias").pick_rows(*slices)
        spec = LinearSpec(in_features, weight.shape[0], weight.format, "bias" in weights)
        return self.node(name, spec, weights)

    def norm(self, name: str, dim: int, eps: float, *, offset: float | None = None) -> Node:
        """An RMSNorm with weight; `offset` instead of the model's own."""
        weight = self.ref(name, (dim,))
        spec = RMSNormSpec(dim, eps, weight.format, self.norm_offset if offset is None else offset)
        return self.node(name, spec, {"weight": weight})

    def mlp(
        self,
        name: str,
        hidden: int,
        intermediate: int,
        *,
        eps: float | None = None,
        post_norm: bool = False,
        clamped: ClampedGLU | None = None,
        activation: str | None = None,
        residual: bool = True,
        out_scale: bool = False,
    ) -> Node:
        """A gated MLP; with `eps` a residual branch with its own norm, without one a bare part.

        Args:
            post_norm: the branch's result has a norm of its own, too.
            clamped, out_scale: as in `MLPSpec`.
            activation: None takes the configuration's.
            residual: False leaves a part with norms of its own, to which nobody adds x.
        """
        gate, up = self._gate_up(name, hidden, intermediate)
        return self.composite(
            name,
            MLPSpec,
            {
                "gate": gate,
                "up": up,
                "down": self.linear(f"{name}.down", intermediate, hidden),
                "norm": None if eps is None else self.norm(f"{name}.norm", hidden, eps),
                "post_norm": self.norm(f"{name}.post_norm", hidden, eps) if eps is not None and post_norm else None,
            },
            {"out_scale": self.ref(f"{name}.out_scale", (1,), self.plain_suffix)} if out_scale else None,
            hidden=hidden,
            intermediate=intermediate,
            activation=activation or self.activation(),
            residual=eps is not None and residual,
            clamped=clamped,
            out_scale=out_scale,
        )

    def activation(self) -> str:
        """The activation of MLPs and experts; GGUF files do not say, every family here uses SiLU."""
        name = self.settings.get("hidden_act", "", without="silu")
        if not isinstance(name, str) or name not in ACTIVATIONS:
            raise self.settings.error(f"activation {name!r} is unknown", f"known: {', '.join(ACTIVATIONS)}")
        return name

    def _gate_up(self, name: str, hidden: int, width: int) -> tuple[Node, Node]:
        gate, up, both = f"{name}.gate", f"{name}.up", f"{name}.gate_up"
        if self.has(gate) or not self.has(both):
            return self.linear(gate, hidden, width), self.linear(up, hidden, width)
        first, second = (0, width), (width, 2 * width)
        return self.row_span(gate, both, hidden, first, 2 * width), self.row_span(up, both, hidden, second, 2 * width)
