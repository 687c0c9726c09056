"""A whole MoE branch as one native call: norm, router, routed and shared experts, residual."""

from __future__ import annotations

import torch

from ktcore.backend import Capabilities, LoadRequest, Supported, Unsupported
from ktcore.backend.handles import nested
from ktcore.ops.moe import MoESpec
from ktcore_cpu import packing
from ktcore_cpu.expert_biases import CLAMPED, clamp_of, unsupported_clamp
from ktcore_cpu.experts import EXPERTS, pack_experts
from ktcore_cpu.norm import PostNorm
from ktcore_cpu.packings import Packs
from ktcore_cpu.router import ROUTER, router_config, unsupported_router


class CpuMoE(Packs):
    """Fused: the input is normed and quantised once, shared experts run in the routed ones' two regions."""

    id = "cpu.moe"
    spec_type = MoESpec
    handles = (
        frozenset({"shared", "shared_gate", "norm", "norm.offset", "residual", "early_router"})
        | {"post_norm", "post_norm.offset"}
        | nested("router", ROUTER)
        | nested("experts", EXPERTS)
        | nested("shared", CLAMPED)
    )
    fused = True
    options = packing.OPTIONS

    def supports(self, spec: MoESpec, device: Capabilities) -> Supported | Unsupported:
        """Every native weight format; shared experts with the routed ones' activation."""
        shared = spec.shared
        parts = (spec.experts,) if shared is None else (spec.experts, shared)
        for unknown in (unsupported_router(spec.router), *(unsupported_clamp(part.clamped) for part in parts)):
            if unknown:
                return unknown
        if shared is not None:
            used = {part.activation for part in (shared, spec.experts) if part.clamped is None}
            if len(used) > 1:
                return Unsupported("shared experts with another activation than the routed ones")
            if spec.experts.weight_on_input and spec.shared_gate is not None:
                return Unsupported("a shared gate beside weights on the experts' input")
        if spec.shared_gate is not None and shared is None:
            return Unsupported("a shared gate without shared experts")
        nodes = device.properties.get("numa_nodes", 1)
        if int(nodes) > 1:
            return Unsupported(
                f"it runs on one pool, and {nodes} NUMA nodes can hold experts: cpu.experts spreads them"
            )
        return packing.supports_formats(spec)

    def load(self, request: LoadRequest) -> CpuMoEModule:
        """Pack the router, all experts and the shared MLP."""
        return CpuMoEModule(request)


class CpuMoEModule:
    """float32 [T, hidden] -> float32 [T, hidden]; with an early router the second argument is what the router sees."""

    def __init__(self, request: LoadRequest) -> None:
        from ktcore_cpu import _native

        spec: MoESpec = request.spec  # type: ignore[assignment]
        self._hidden, self._early = spec.hidden, spec.early_router
        shared = {
            f"shared_{part}": packing.pack(request, f"shared.{role}.weight")
            for part, role in (("gate_proj", "gate"), ("up", "up"), ("down", "down"))
            if spec.shared is not None
        }
        self._bank = pack_experts(request, spec.experts, "experts.")
        self._block = _native.MoEBlock(
            request.runtime.pool,  # type: ignore[attr-defined]
            self._bank,
            packing.pack(request, "router.weight"),
            router_config(request, spec.router, "router."),
            **shared,
            shared_gate=packing.pack(request, "shared_gate.weight") if spec.shared_gate is not None else None,
            norm=packing.norm_weight(request.weights, "norm.weight", spec.norm),
            norm_eps=spec.norm.eps if spec.norm else 0.0,
            activation=_activation(spec),
            weight_on_input=spec.experts.weight_on_input,
            residual=spec.residual and spec.post_norm is None,
            exact=packing.exact(request),
            clamp=clamp_of(spec.experts.clamped),
            shared_clamp=clamp_of(spec.shared.clamped) if spec.shared is not None else None,
        )

        self._finish = PostNorm(request, spec.post_norm, spec.residual) if spec.post_norm else None

    def expert_load(self) -> torch.Tensor:
        """Tokens that each routed expert has been given, int64 [experts]."""
        return torch.from_numpy(self._bank.load)

    def __call__(self, x: torch.Tensor, before: torch.Tensor | None = None) -> torch.Tensor:
        x = packing.rows(x, self._hidden)
        out = torch.empty_like(x)
        if not self._early:
            self._block.forward(x.data_ptr(), out.data_ptr(), x.shape[0])
            return out if self._finish is None else self._finish(x, out)
        if before is None or before.shape != x.shape:
            raise ValueError(f"this branch's router runs early: expected what it sees as float32 {list(x.shape)}")
        before = packing.rows(before, self._hidden)
        self._block.forward(x.data_ptr(), out.data_ptr(), x.shape[0], before.data_ptr())
        return out if self._finish is None else self._finish(x, out)


def _activation(spec: MoESpec) -> str:
    """Of whichever part has none within limits."""
    shared = spec.shared
    return shared.activation if shared is not None and spec.experts.clamped is not None else spec.experts.activation
