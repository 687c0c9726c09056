"""The attention branches, composed of the parts that the rules chose: grouped-query and latent."""

from __future__ import annotations

from typing import cast

import torch

from ktcore.backend import Capabilities, LoadRequest, Supported, Unsupported
from ktcore.backend.mirror import mirrored
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

    def load(self, request: LoadRequest) -> SimAttentionModule:
        """Nothing to pack: the parts hold the weights."""
        return SimAttentionModule(request)


class SimAttentionModule:
    """x float32 [T, hidden], step -> [T, hidden]."""

    def __init__(self, request: LoadRequest) -> None:
        self._spec = cast(AttentionSpec, request.spec)
        self._parts = request.children
        self._runtime = request.runtime

    def __call__(self, x: torch.Tensor, step: StepBatch) -> torch.Tensor:
        s, parts = self._spec, self._parts
        n = parts["norm"](x) if s.norm else x
        q = parts["q"](n).view(-1, s.heads, s.head_dim)
        k = parts["k"](n).view(-1, s.kv_heads, s.head_dim)
        v = parts["v"](n).view(-1, s.kv_heads, s.head_dim)
        q = parts["q_norm"](q) if s.q_norm else q
        k = parts["k_norm"](k) if s.k_norm else k
        if s.rope:
            at = mirrored(self._runtime, step, "sim.positions", lambda b: b.positions)
            q, k = parts["rope"](q, at), parts["rope"](k, at)
        parts["cache"].append(step, k, v)
        y = parts["o"](parts["cache"].attend(step, q, s.scale).reshape(x.shape[0], -1))
        y = parts["post_norm"](y) if s.post_norm else y
        return cast(torch.Tensor, x + y if s.residual else y)


class SimMLA(SimImplementation):
    """Latent attention, absorbed: keys are never expanded."""

    id = "sim.mla"
    spec_type = MLASpec

    def load(self, request: LoadRequest) -> SimMLAModule:
        """Bring the up-projections to the device, one matrix a head."""
        return SimMLAModule(request)

    def packed_bytes(self, spec: MLASpec, stored_bytes: int) -> int:
        """Float32 of the up-projections; the parts count themselves."""
        return FLOAT_BYTES * spec.heads * (spec.nope_dim + spec.value_dim) * spec.latent


class SimMLAModule:
    """x float32 [T, hidden], step -> [T, hidden]."""

    def __init__(self, request: LoadRequest) -> None:
        s = self._spec = cast(MLASpec, request.spec)
        self._parts = request.children
        self._runtime = request.runtime
        if s.split_kv_b:
            # stored transposed: k_b [heads, L, N], v_b [heads, V, L]
            self._k_up = weight(request, "k_b").transpose(1, 2).contiguous()
            self._v_up = weight(request, "v_b").transpose(1, 2).contiguous()
        else:
            up = weight(request, "kv_b").view(s.heads, s.nope_dim + s.value_dim, s.latent)
            self._k_up = up[:, : s.nope_dim].contiguous()
            self._v_up = up[:, s.nope_dim :].transpose(1, 2).contiguous()

    def __call__(self, x: torch.Tensor, step: StepBatch) -> torch.Tensor:
        s, parts = self._spec, self._parts
        n = parts["norm"](x) if s.norm else x
        q = (parts["q"](n) if s.q else parts["q_b"](parts["q_a_norm"](parts["q_a"](n)))).view(
            -1, s.heads, s.nope_dim + s.rope_dim
        )
        latent, k_rope = parts["kv_a"](n).split((s.latent, s.rope_dim), -1)
        q_nope, q_rope = q.split((s.nope_dim, s.rope_dim), -1)
        at = mirrored(self._runtime, step, "sim.positions", lambda b: b.positions)
        q_rope = parts["rope"](q_rope.contiguous(), at)
        k_rope = parts["rope"](k_rope[:, None, :].contiguous(), at)[:, 0]
        parts["cache"].append(step, parts["kv_a_norm"](latent.contiguous()), k_rope)
        # [heads, T, N] x [heads, N, L]: the query in latent space
        absorbed = torch.bmm(q_nope.transpose(0, 1), self._k_up).transpose(0, 1)
        seen = parts["cache"].attend(step, torch.cat((absorbed, q_rope), -1), s.scale)
        values = torch.bmm(seen.transpose(0, 1), self._v_up).transpose(0, 1)
        y = parts["o"](values.reshape(x.shape[0], -1))
        return cast(torch.Tensor, x + y if s.residual else y)
