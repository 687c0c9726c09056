"""Router and experts over the SYCL kernels, ids "xpu.sycl_router" and "xpu.sycl_experts"."""

from __future__ import annotations

from typing import cast

import torch
from ktcore_triton.affine import affine_bank, affine_bytes, supported

from ktcore.backend import Capabilities, LoadRequest, Module, Supported, Unsupported
from ktcore.ops.moe import ExpertsSpec, RouterSpec
from ktcore_xpu.sycl.launcher import launcher_for
from ktcore_xpu.sycl.operators import FLOAT_BYTES, SyclImplementation


class SyclRouter(SyclImplementation):
    """Softmax, sigmoid, groups, biases, choice by logits. Logits in float32: a choice hangs by a hair."""

    id = "xpu.sycl_router"
    spec_type = RouterSpec

    def load(self, request: LoadRequest) -> Module:
        """The weight stays float32."""
        spec = cast(RouterSpec, request.spec)
        launcher, device = launcher_for(request.runtime), request.runtime.device
        weight = request.weights["weight"].tensor().float().to(device).t().contiguous()
        bias = request.weights["bias"].tensor().float().to(device) if spec.choice_bias else None
        logit_bias = request.weights["logit_bias"].tensor().float().to(device) if spec.logit_bias else None

        def run(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            from ktcore_xpu.sycl.experts import route

            logits = torch.mm(x, weight)
            return route(launcher, logits if logit_bias is None else logits + logit_bias, spec, bias)

        return run

    def packed_bytes(self, spec: RouterSpec, stored_bytes: int) -> int:
        """Float32."""
        return FLOAT_BYTES * spec.experts * (spec.hidden + spec.choice_bias + spec.logit_bias)


class SyclExperts(SyclImplementation):
    """All experts in two launches, for those that a rule makes resident; made for the few tokens of decoding."""

    id = "xpu.sycl_experts"
    spec_type = ExpertsSpec

    def supports(self, spec: ExpertsSpec, device: Capabilities) -> Supported | Unsupported:
        """Quantised in groups, SwiGLU, without biases."""
        if spec.bias or spec.clamped or spec.weight_on_input or spec.activation != "silu":
            return Unsupported("experts with biases, weights on their input, or another activation than silu")
        if spec.gate_format != spec.up_format:
            return Unsupported(f"gate in {spec.gate_format} and up in {spec.up_format}, which must be of one format")
        for name in (spec.gate_format, spec.down_format):
            if not supported(name):
                return Unsupported(f"experts in {name}: the kernel takes formats with scales in groups")
        return super().supports(spec, device)

    def load(self, request: LoadRequest) -> Module:
        """Repack expert by expert: the peak is the result and one expert."""
        spec = cast(ExpertsSpec, request.spec)
        launcher, device = launcher_for(request.runtime), request.runtime.device
        gate, up, down = (affine_bank(request.weights[role], device) for role in ("gate", "up", "down"))

        def run(x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
            from ktcore_xpu.sycl.experts import routed_experts

            return routed_experts(
                launcher, x.contiguous(), ids.contiguous(), weights.contiguous(), gate, up, down, spec.experts
            )

        return run

    def packed_bytes(self, spec: ExpertsSpec, stored_bytes: int) -> int:
        """Of the layout."""
        if not (supported(spec.gate_format) and supported(spec.down_format)):
            return stored_bytes
        wide = affine_bytes(spec.gate_format, spec.experts * spec.intermediate, spec.hidden)
        return 2 * wide + affine_bytes(spec.down_format, spec.experts * spec.hidden, spec.intermediate)
