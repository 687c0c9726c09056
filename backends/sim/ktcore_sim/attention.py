"""The attention branches, composed of the parts that the rules chose: grouped-query and latent."""

from __future__ import annotations

from typing import cast

import torch

from ktcore.backend import Capabilities, LoadRequest, Module, Supported, Unsupported
from ktcore.backend.branches import attention_branch, mla_branch
from ktcore.ops.attention import AttentionSpec
from ktcore.ops.batch import StepBatch
from ktcore.ops.mla import MLASpec
from ktcore_sim.base import FLOAT_BYTES, SimImplementation, weight


class SimAttention(SimImplementation):
    """Grouped-query attention."""

    id = "sim.attention"
    spec_type = AttentionSpec

    def supports(self, spec: AttentionSpec, device: Capabilities) -> Supported | Unsupported:
        """Ordinary attention: no gate, sinks, temperature, nor norms after RoPE."""
        if spec.gate or spec.sinks or spec.temperature or spec.norm_after_rope:
            return Unsupported("attention with a gate, sinks, temperature, or norms after RoPE")
        return super().supports(spec, device)

    def load(self, request: LoadRequest) -> Module:
        """Nothing to pack: the parts hold the weights."""
        return attention_branch(request)


class SimMLA(SimImplementation):
    """Latent attention, absorbed: keys are never expanded."""

    id = "sim.mla"
    spec_type = MLASpec

    def load(self, request: LoadRequest) -> Module:
        """Bring the up-projections to the device, one matrix a head."""
        return mla_branch(request, SimMLAModule(request))

    def packed_bytes(self, spec: MLASpec, stored_bytes: int) -> int:
        """Float32 of the up-projections; the parts count themselves."""
        return FLOAT_BYTES * spec.heads * (spec.nope_dim + spec.value_dim) * spec.latent


class SimMLAModule:
    """(step, q_nope [T, heads, N], q_rope [T, heads, R]) -> [T, heads, V], over the cached latents."""

    def __init__(self, request: LoadRequest) -> None:
        s = self._spec = cast(MLASpec, request.spec)
        self._cache = request.children["cache"]
        if s.split_kv_b:
            # stored transposed: k_b [heads, L, N], v_b [heads, V, L]
            self._k_up = weight(request, "k_b").transpose(1, 2).contiguous()
            self._v_up = weight(request, "v_b").transpose(1, 2).contiguous()
        else:
            up = weight(request, "kv_b").view(s.heads, s.nope_dim + s.value_dim, s.latent)
            self._k_up = up[:, : s.nope_dim].contiguous()
            self._v_up = up[:, s.nope_dim :].transpose(1, 2).contiguous()

    def __call__(self, step: StepBatch, q_nope: torch.Tensor, q_rope: torch.Tensor) -> torch.Tensor:
        # [heads, T, N] x [heads, N, L]: the query in latent space
        absorbed = torch.bmm(q_nope.transpose(0, 1), self._k_up).transpose(0, 1)
        seen = self._cache.attend(step, torch.cat((absorbed, q_rope), -1), self._spec.scale)
        return torch.bmm(seen.transpose(0, 1), self._v_up).transpose(0, 1)
