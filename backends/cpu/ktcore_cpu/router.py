"""The expert router as one native call: float32 logits, scores, group filter, top-k, weights."""

from __future__ import annotations

from typing import Any

import torch

from ktcore.backend import Capabilities, Implementation, LoadRequest, Supported, Unsupported
from ktcore.ops.moe import RouterSpec
from ktcore_cpu import packing

ROUTER = frozenset(
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
        "root_softplus",
    }
)
"""Fields of the spec that the native router computes."""


class CpuRouter(Implementation):
    """Every kind of routing in `RouterSpec`. Equal scores go to the lower expert."""

    id = "cpu.router"
    spec_type = RouterSpec
    handles = ROUTER | {"expert_scale"}

    def supports(self, spec: RouterSpec, device: Capabilities) -> Supported | Unsupported:
        """Every native weight format; a choice by logits without groups and without a bias of its own."""
        return unsupported_router(spec) or packing.supports_formats(spec)

    def packed_bytes(self, spec: RouterSpec, stored_bytes: int) -> int:
        """Stored bytes, rows padded to whole panels."""
        return packing.padded_bytes(spec.experts, stored_bytes, spec.formats())

    def load(self, request: LoadRequest) -> CpuRouterModule:
        """Pack the weight."""
        return CpuRouterModule(request)


def unsupported_router(spec: RouterSpec) -> Unsupported | None:
    """What the native router does not know of a spec; None when it knows all."""
    if spec.on_logits and (spec.choice_bias or spec.groups > 1):
        return Unsupported("experts chosen by logits in groups or with a bias of the choice")
    return None


class CpuRouterModule:
    """x float32 [T, hidden] -> ids int64 [T, k], weights float32 [T, k]."""

    def __init__(self, request: LoadRequest) -> None:
        from ktcore_cpu import _native

        spec: RouterSpec = request.spec  # type: ignore[assignment]
        self._spec = spec
        self._block = _native.RouterBlock(
            request.runtime.pool,  # type: ignore[attr-defined]
            packing.pack(request, "weight"),
            router_config(request, spec),
        )
        scales = packing.vector(request.weights, "expert_scale") if spec.expert_scale else None
        self._scales = None if scales is None else torch.from_numpy(scales)

    def __call__(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x = packing.rows(x, self._spec.hidden)
        shape = (x.shape[0], self._spec.top_k)
        ids, weights = torch.empty(shape, dtype=torch.int64), torch.empty(shape)
        self._block.forward(x.data_ptr(), ids.data_ptr(), weights.data_ptr(), x.shape[0])
        return ids, weights if self._scales is None else weights.mul_(self._scales[ids])


def router_config(request: LoadRequest, spec: RouterSpec, prefix: str = "") -> dict[str, Any]:
    """The spec as the native router takes it."""
    return {
        "experts": spec.experts,
        "top_k": spec.top_k,
        "score": spec.score,
        "bias": packing.vector(request.weights, f"{prefix}bias") if spec.choice_bias else None,
        "groups": spec.groups,
        "groups_kept": spec.groups_kept,
        "group_score": spec.group_score,
        "renormalise": spec.renormalise,
        "renorm_eps": spec.renorm_eps,
        "scale": spec.scale,
        "logit_bias": packing.vector(request.weights, f"{prefix}logit_bias") if spec.logit_bias else None,
        "on_logits": spec.on_logits,
        "root_softplus": spec.root_softplus,
    }
