"""Mixture-of-experts branches, for every way that checkpoints store expert tensors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ktcore.graph.maker import NodeMaker
from ktcore.graph.node import Node
from ktcore.ops.linear import LinearSpec
from ktcore.ops.moe import ExpertsSpec, MoESpec, RouterSpec
from ktcore.weights.ref import WeightRef


@dataclass(frozen=True)
class Routing:
    """How a family chooses experts; the fields are those of `RouterSpec`."""

    experts: int
    top_k: int
    score: Literal["softmax", "sigmoid"] = "softmax"
    choice_bias: bool = False
    groups: int = 1
    groups_kept: int = 1
    group_score: Literal["max", "top2_sum"] = "max"
    renormalise: bool = False
    renorm_eps: float = 0.0
    scale: float = 1.0


def moe_node(
    make: NodeMaker,
    name: str,
    hidden: int,
    intermediate: int,
    eps: float,
    routing: Routing,
    shared: int = 0,
    *,
    shared_gate: bool = False,
) -> Node:
    """A residual branch of routed experts.

    Args:
        intermediate: width of one expert.
        shared: width of the shared MLP, all shared experts together; 0 for none.
        shared_gate: a learnt gate scales the shared part.
    """
    return make.composite(
        name,
        MoESpec,
        {
            "router": _router(make, f"{name}.router", hidden, routing),
            "experts": _experts(make, f"{name}.experts", hidden, intermediate, routing),
            "shared": make.mlp(f"{name}.shared", hidden, shared) if shared else None,
            "shared_gate": _shared_gate(make, f"{name}.shared_gate", hidden) if shared and shared_gate else None,
            "norm": make.norm(f"{name}.norm", hidden, eps),
        },
        hidden=hidden,
    )


def _shared_gate(make: NodeMaker, name: str, hidden: int) -> Node:
    weight = make.ref(name, (1, hidden), fold=True)  # GGUF holds it as a vector
    return make.node(name, LinearSpec(hidden, 1, weight.format), {"weight": weight})


def _router(make: NodeMaker, name: str, hidden: int, r: Routing) -> Node:
    if not 0 < r.top_k <= r.experts or r.experts % r.groups or not 0 < r.groups_kept <= r.groups:
        raise make.settings.error(
            f"cannot choose {r.top_k} of {r.experts} experts in {r.groups_kept} of {r.groups} groups"
        )
    weights = {"weight": make.ref(name, (r.experts, hidden))}
    if r.choice_bias:
        weights["bias"] = make.ref(f"{name}.bias", (r.experts,), "")
    spec = RouterSpec(
        hidden,
        r.experts,
        r.top_k,
        weights["weight"].format,
        r.score,
        r.choice_bias,
        r.groups,
        r.groups_kept,
        r.group_score,
        r.renormalise,
        r.renorm_eps,
        r.scale,
    )
    return make.node(name, spec, weights)


def _experts(make: NodeMaker, name: str, hidden: int, width: int, r: Routing) -> Node:
    others = make.settings.experts
    if others is not None:
        return others.node(name, make.settings.checkpoint, hidden, width, r.experts, r.top_k)
    gate, up = _gate_up(make, name, hidden, width, r.experts)
    if make.has(f"{name}.fused_down", ""):
        down = make.ref(f"{name}.fused_down", (r.experts, hidden, width), "")
    else:
        down = make.stack(f"{name}.down", r.experts, (hidden, width))
    spec = ExpertsSpec(hidden, width, r.experts, r.top_k, make.activation(), gate.format, up.format, down.format)
    return make.node(name, spec, {"gate": gate, "up": up, "down": down})


def _gate_up(make: NodeMaker, name: str, hidden: int, width: int, experts: int) -> tuple[WeightRef, WeightRef]:
    if make.has(f"{name}.fused_gate_up", ""):
        both = make.ref(f"{name}.fused_gate_up", (experts, 2 * width, hidden), "")
        return both.slice_rows(0, width), both.slice_rows(width, 2 * width)
    shape = (width, hidden)
    return make.stack(f"{name}.gate", experts, shape), make.stack(f"{name}.up", experts, shape)
