"""Mixture of experts: router, experts resident on the device, and the branch."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import torch

from ktcore.backend import Capabilities, LoadRequest, Module, Supported, Unsupported
from ktcore.backend.branches import MOE, moe_branch
from ktcore.backend.loading import compute_dtype, on_device
from ktcore.ops.moe import ExpertsSpec, MoESpec, RouterSpec
from ktcore.weights import get_format
from ktcore_triton.affine import AffineWeight, affine_bank, affine_bytes, supported
from ktcore_triton.operators.base import FLOAT_BYTES, TritonImplementation

Chosen = tuple[torch.Tensor, torch.Tensor]
Choose = Callable[[torch.Tensor, RouterSpec, "torch.Tensor | None"], Chosen]


class TritonRouter(TritonImplementation):
    """Softmax, sigmoid, groups, biases, choice by logits. Logits in float32: a choice hangs by a hair."""

    spec_type = RouterSpec
    handles = frozenset(
        {
            "score",
            "choice_bias",
            "groups",
            "groups_kept",
            "group_score",
            "renormalise",
            "renorm_eps",
            "scale",
            "logit_bias",
            "on_logits",
        }
    )

    def load(self, request: LoadRequest) -> Module:
        """The weight stays float32."""

        def choose(logits: torch.Tensor, spec: RouterSpec, bias: torch.Tensor | None) -> Chosen:
            from ktcore_triton.experts import route

            return route(logits, spec, bias)

        return routing(request, choose)

    def packed_bytes(self, spec: RouterSpec, stored_bytes: int) -> int:
        """Float32."""
        return router_bytes(spec)


class TritonExperts(TritonImplementation):
    """All experts in two launches, for those that a rule makes resident."""

    spec_type = ExpertsSpec
    handles = frozenset({"weight_on_input", "bias", "clamped", "clamped.plus", "clamped.after"})
    options = frozenset({"compute"})

    def supports(self, spec: ExpertsSpec, device: Capabilities) -> Supported | Unsupported:
        """Quantised in groups, gate and up of one format."""
        if why := refused_formats(spec):
            return Unsupported(why)
        return super().supports(spec, device)

    def load(self, request: LoadRequest) -> Module:
        """Repack expert by expert: the peak is the result and one expert."""
        spec = cast(ExpertsSpec, request.spec)
        compute, tuning = compute_dtype(request), self.tuning(request.device)
        gate, up, down = banks(request, dense=True)
        biases = None
        if spec.bias:
            biases = on_device(request, "gate_bias"), on_device(request, "up_bias"), on_device(request, "down_bias")

        def run(x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
            from ktcore_triton.experts import Between, routed_experts

            between = Between(spec.activation, spec.clamped, spec.weight_on_input, biases)
            return routed_experts(
                x.contiguous(), ids, weights, gate, up, down, spec.experts,
                between=between, tiles=tuning.experts(x.shape[0]), compute=compute,
            )  # fmt: skip

        return run

    def packed_bytes(self, spec: ExpertsSpec, stored_bytes: int) -> int:
        """Of the layout."""
        return bank_bytes(spec, stored_bytes, dense=True)


class TritonMoE(TritonImplementation):
    """Composed; the shared part runs while routed experts on the host compute."""

    spec_type = MoESpec
    handles = MOE

    def load(self, request: LoadRequest) -> Module:
        """Nothing to pack: the parts hold the weights."""
        return moe_branch(request)


def routing(request: LoadRequest, choose: Choose) -> Callable[[torch.Tensor], Chosen]:
    """x float32 [T, hidden] -> ids and weights [T, k]; logits in float32, from which `choose` chooses."""
    spec = cast(RouterSpec, request.spec)
    weight = on_device(request, "weight").t().contiguous()
    bias = on_device(request, "bias") if spec.choice_bias else None
    logit_bias = on_device(request, "logit_bias") if spec.logit_bias else None

    def run(x: torch.Tensor) -> Chosen:
        logits = torch.mm(x, weight)
        return choose(logits if logit_bias is None else logits + logit_bias, spec, bias)

    return run


def router_bytes(spec: RouterSpec) -> int:
    """Device bytes of a router in float32."""
    return FLOAT_BYTES * spec.experts * (spec.hidden + spec.choice_bias + spec.logit_bias)


def refused_formats(spec: ExpertsSpec) -> str:
    """Why experts cannot be held as affine banks; empty where they can."""
    if spec.gate_format != spec.up_format:
        return f"gate in {spec.gate_format} and up in {spec.up_format}, which must be of one format"
    unfit = [name for name in (spec.gate_format, spec.down_format) if not supported(name)]
    if unfit:
        return f"experts in {unfit[0]}: the kernel takes formats with scales in groups"
    ordered = [name for name in (spec.gate_format, spec.down_format) if get_format(name).ordered]
    if ordered:
        return f"experts in {ordered[0]}: each has columns in an order of its own, which the kernel does not follow"
    return ""


def banks(request: LoadRequest, dense: bool = False) -> tuple[AffineWeight, AffineWeight, AffineWeight]:
    """Gate, up and down of all experts on the device."""
    device = request.runtime.device
    gate, up, down = (affine_bank(request.weights[role], device, dense=dense) for role in ("gate", "up", "down"))
    return gate, up, down


def bank_bytes(spec: ExpertsSpec, stored_bytes: int, dense: bool = False) -> int:
    """Device bytes of them."""
    if not (supported(spec.gate_format) and supported(spec.down_format)):
        return stored_bytes
    wide = affine_bytes(spec.gate_format, spec.experts * spec.intermediate, spec.hidden, dense=dense)
    return 2 * wide + affine_bytes(spec.down_format, spec.experts * spec.hidden, spec.intermediate, dense=dense)
