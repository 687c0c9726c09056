"""Router and experts over the SYCL kernels, ids "xpu.sycl_router" and "xpu.sycl_experts"."""

from __future__ import annotations

from typing import cast

import torch
from ktcore_triton.operators.moe import Chosen, bank_bytes, banks, refused_formats, router_bytes, routing

from ktcore.backend import Capabilities, LoadRequest, Module, Supported, Unsupported
from ktcore.ops.moe import ExpertsSpec, RouterSpec
from ktcore_xpu.sycl.launcher import launcher_for
from ktcore_xpu.sycl.operators import SyclImplementation


class SyclRouter(SyclImplementation):
    """Softmax, sigmoid, groups, biases, choice by logits. Logits in float32: a choice hangs by a hair."""

    id = "xpu.sycl_router"
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
        launcher = launcher_for(request.runtime)

        def choose(logits: torch.Tensor, spec: RouterSpec, bias: torch.Tensor | None) -> Chosen:
            from ktcore_xpu.sycl.experts import route

            return route(launcher, logits, spec, bias)

        return routing(request, choose)

    def packed_bytes(self, spec: RouterSpec, stored_bytes: int) -> int:
        """Float32."""
        return router_bytes(spec)


class SyclExperts(SyclImplementation):
    """All experts in two launches, for those that a rule makes resident; made for the few tokens of decoding."""

    id = "xpu.sycl_experts"
    spec_type = ExpertsSpec

    def supports(self, spec: ExpertsSpec, device: Capabilities) -> Supported | Unsupported:
        """Quantised in groups, SwiGLU, without biases."""
        if spec.activation != "silu":
            return Unsupported(f"activation {spec.activation}: the kernel is SwiGLU")
        if why := refused_formats(spec):
            return Unsupported(why)
        return super().supports(spec, device)

    def load(self, request: LoadRequest) -> Module:
        """Repack expert by expert: the peak is the result and one expert."""
        spec = cast(ExpertsSpec, request.spec)
        launcher = launcher_for(request.runtime)
        gate, up, down = banks(request)

        def run(x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
            from ktcore_xpu.sycl.experts import routed_experts

            return routed_experts(
                launcher, x.contiguous(), ids.contiguous(), weights.contiguous(), gate, up, down, spec.experts
            )

        return run

    def packed_bytes(self, spec: ExpertsSpec, stored_bytes: int) -> int:
        """Of the layout."""
        return bank_bytes(spec, stored_bytes)
