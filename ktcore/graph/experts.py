"""Mixture-of-experts branches, for every way that checkpoints store expert tensors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ktcore.graph.maker import NodeMaker
from ktcore.graph.node import Node
from ktcore.ops.linear import LinearSpec
from ktcore.ops.mlp import ClampedGLU
from ktcore.ops.moe import ExpertsSpec, MoESpec, RouterSpec
from ktcore.weights.formats import get_format
from ktcore.weights.ref import RowSlice, WeightRef

CHOICE = (
    ("num_experts_per_tok", "expert_used_count"),
    ("n_group", "expert_group_count"),
    ("topk_group", "expert_group_used_count"),
)


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
    logit_bias: bool = False
    on_logits: bool = False
    expert_scale: bool = False
    by_token: int = 0
    root_softplus: bool = False


@dataclass(frozen=True)
class Experts:
    """What a family's experts compute, and how hub folders store the fused tensors.

    Attributes:
        activation: None takes the configuration's.
        input_major: fused tensors are [experts, in, out], unless their format has blocks of several values.
        interleaved: their rows of gate and up take turns, instead of one after the other.
        weight_on_input, bias, clamped: as in `ExpertsSpec`.
    """

    activation: str | None = None
    input_major: bool = False
    interleaved: bool = False
    weight_on_input: bool = False
    bias: bool = False
    clamped: ClampedGLU | None = None


def moe_node(
    make: NodeMaker,
    name: str,
    hidden: int,
    intermediate: int,
    eps: float | None,
    routing: Routing,
    shared: int = 0,
    *,
    shared_gate: bool = False,
    shared_clamped: ClampedGLU | None = None,
    kind: Experts = Experts(),
    early_router: bool = False,
    post_norm: bool = False,
    residual: bool = True,
) -> Node:
    """A residual branch of routed experts.

    Args:
        intermediate: width of one expert.
        eps: of the norm of its input; None where that is normed already.
        shared: width of the shared MLP, all shared experts together; 0 for none.
        shared_gate: a learnt gate scales the shared part.
        shared_clamped: of the shared MLP, as `kind` has its own for the experts.
        early_router: the router sees the layer's input.
        post_norm: the branch's result has a norm of its own, too.
        residual: the branch adds its input, which one between residual streams does not.
    """
    return make.composite(
        name,
        MoESpec,
        {
            "router": router_node(make, f"{name}.router", hidden, routing),
            "experts": experts_node(make, f"{name}.experts", hidden, intermediate, routing, kind),
            "shared": make.mlp(f"{name}.shared", hidden, shared, clamped=shared_clamped) if shared else None,
            "shared_gate": _shared_gate(make, f"{name}.shared_gate", hidden) if shared and shared_gate else None,
            "norm": None if eps is None else make.norm(f"{name}.norm", hidden, eps),
            "post_norm": make.norm(f"{name}.post_norm", hidden, eps) if post_norm and eps is not None else None,
        },
        hidden=hidden,
        early_router=early_router,
        residual=residual,
    )


def _shared_gate(make: NodeMaker, name: str, hidden: int) -> Node:
    weight = make.ref(name, (1, hidden), fold=True)  # GGUF holds it as a vector
    return make.node(name, LinearSpec(hidden, 1, weight.format), {"weight": weight})


def router_node(make: NodeMaker, name: str, hidden: int, r: Routing) -> Node:
    """What chooses experts."""
    if not 0 < r.top_k <= r.experts or r.experts % r.groups or not 0 < r.groups_kept <= r.groups:
        raise make.settings.error(
            f"cannot choose {r.top_k} of {r.experts} experts in {r.groups_kept} of {r.groups} groups",
            make.settings.about(*CHOICE),
        )
    weights = {"weight": make.ref(name, (r.experts, hidden))}
    if r.choice_bias:
        weights["bias"] = make.ref(f"{name}.bias", (r.experts,), "", fold=True)  # ERNIE's has an axis of 1 before
    if r.logit_bias:
        weights["logit_bias"] = make.ref(name, (r.experts,), ".bias")
    if r.expert_scale:
        weights["expert_scale"] = make.ref(f"{name}.expert_scale", (r.experts,), "")  # GGUF: with the down projections
    if r.by_token:
        weights["table"] = make.ref(f"{name}.table", (r.by_token, r.top_k), "")
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
        r.logit_bias,
        r.on_logits,
        r.expert_scale,
        r.by_token,
        r.root_softplus,
    )
    return make.node(name, spec, weights)


def experts_node(make: NodeMaker, name: str, hidden: int, width: int, r: Routing, kind: Experts) -> Node:
    """Routed experts of `width`, whichever way the checkpoint stores them."""
    others = make.settings.experts
    if others is not None:
        if kind != Experts():
            raise make.settings.error(f"experts of '{make.settings.architecture}' cannot come from another checkpoint")
        return others.node(name, make.settings.checkpoint, hidden, width, r.experts, r.top_k)
    gate, up = _gate_up(make, name, hidden, width, r.experts, kind)
    if make.has(f"{name}.fused_down", ""):
        down = _fused(make, f"{name}.fused_down", (r.experts, hidden, width), kind)
    else:
        down = make.stack(f"{name}.down", r.experts, (hidden, width))
    spec = ExpertsSpec(
        hidden,
        width,
        r.experts,
        r.top_k,
        kind.activation or make.activation(),
        gate.format,
        up.format,
        down.format,
        kind.weight_on_input,
        kind.bias,
        kind.clamped,
    )
    weights = {"gate": gate, "up": up, "down": down}
    if kind.bias:
        weights |= _biases(make, name, hidden, width, r.experts, kind)
    return make.node(name, spec, weights)


def _gate_up(
    make: NodeMaker, name: str, hidden: int, width: int, experts: int, kind: Experts
) -> tuple[WeightRef, WeightRef]:
    if make.has(f"{name}.fused_gate_up", ""):
        both = _fused(make, f"{name}.fused_gate_up", (experts, 2 * width, hidden), kind)
        gate, up = _halves(width, kind)
        return both.pick_rows(gate), both.pick_rows(up)
    shape = (width, hidden)
    return make.stack(f"{name}.gate", experts, shape), make.stack(f"{name}.up", experts, shape)


def _fused(make: NodeMaker, name: str, shape: tuple[int, int, int], kind: Experts) -> WeightRef:
    """A tensor of all experts, as [experts, out, in] whatever way it is stored."""
    stored = make.settings.checkpoint.tensors[make.names.of(name)]
    if make.settings.gguf or not kind.input_major or get_format(stored.format).block_size > 1:
        return make.ref(name, shape, "")
    return make.ref(name, (shape[0], shape[2], shape[1]), "").swap()


def _halves(width: int, kind: Experts) -> tuple[RowSlice, RowSlice]:
    """Where gate's and up's rows lie in a fused tensor."""
    if kind.interleaved:
        return (0, 2 * width, 2), (1, 2 * width, 2)
    return (0, width, 1), (width, 2 * width, 1)


def _biases(make: NodeMaker, name: str, hidden: int, width: int, experts: int, kind: Experts) -> dict[str, WeightRef]:
    if make.settings.gguf or not make.has(f"{name}.fused_gate_up", ""):
        sizes = {"gate": width, "up": width, "down": hidden}
        return {f"{role}_bias": make.stack(f"{name}.{role}", experts, (n,), ".bias") for role, n in sizes.items()}
    both = make.ref(f"{name}.fused_gate_up", (experts, 2 * width), "_bias")
    gate, up = _halves(width, kind)
    return {
        "gate_bias": both.pick_rows(gate, items=True),
        "up_bias": both.pick_rows(up, items=True),
        "down_bias": make.ref(f"{name}.fused_down", (experts, hidden), "_bias"),
    }
