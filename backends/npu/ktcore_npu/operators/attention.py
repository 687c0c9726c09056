"""The attention branches, composed of the parts that the rules chose: grouped-query and latent."""

from __future__ import annotations

from typing import cast

import torch

from ktcore.backend import LoadRequest, Module
from ktcore.backend.branches import attention_branch, mla_branch
from ktcore.ops.attention import AttentionSpec
from ktcore.ops.batch import StepBatch
from ktcore.ops.mla import MLASpec
from ktcore_npu.operators.base import FLOAT_BYTES, HALF_BYTES, NpuImplementation, compute_dtype, on_device


class NpuAttention(NpuImplementation):
    """Grouped-query attention: gates, temperature, norms before or after RoPE; sinks where the cache takes them."""

    spec_type = AttentionSpec

    def load(self, request: LoadRequest) -> Module:
        """Only sinks are its own: the parts hold the other weights."""
        sinks = on_device(request, "sinks") if cast(AttentionSpec, request.spec).sinks else None
        return attention_branch(request, sinks)

    def packed_bytes(self, spec: AttentionSpec, stored_bytes: int) -> int:
        """Float32 of the sinks."""
        return FLOAT_BYTES * spec.heads * spec.sinks


class NpuMLA(NpuImplementation):
    """Latent attention, absorbed: keys are never expanded. `npu_mla_prolog_v3` is not used: it fixes hidden sizes and
    ranks, and takes the projections as unquantised NZ matrices."""

    spec_type = MLASpec
    options = frozenset({"compute"})

    def load(self, request: LoadRequest) -> Module:
        """Bring the up-projections to the device, one matrix a head."""
        return mla_branch(request, _Absorbed(request))

    def packed_bytes(self, spec: MLASpec, stored_bytes: int) -> int:
        """16 bits a value of the up-projections, 32 of such ones; the parts count themselves."""
        return (
            (FLOAT_BYTES if spec.kv_b_format == "F32" else HALF_BYTES)
            * spec.heads
            * (spec.nope_dim + spec.value_dim)
            * spec.latent
        )


class _Absorbed:
    """(step, q_nope [T, heads, N], q_rope [T, heads, R]) -> [T, heads, V], over the cached latents."""

    def __init__(self, request: LoadRequest) -> None:
        s = self._spec = cast(MLASpec, request.spec)
        self._cache = request.children["cache"]
        self._compute = torch.float32 if s.kv_b_format == "F32" else compute_dtype(request)
        if s.split_kv_b:
            # stored transposed: k_b [heads, L, N], v_b [heads, V, L]
            self._k_up = on_device(request, "k_b", self._compute).transpose(1, 2).contiguous()
            self._v_up = on_device(request, "v_b", self._compute).transpose(1, 2).contiguous()
        else:
            up = on_device(request, "kv_b", self._compute).view(s.heads, s.nope_dim + s.value_dim, s.latent)
            self._k_up = up[:, : s.nope_dim].contiguous()
            self._v_up = up[:, s.nope_dim :].transpose(1, 2).contiguous()

    def __call__(self, step: StepBatch, q_nope: torch.Tensor, q_rope: torch.Tensor) -> torch.Tensor:
        # [heads, T, N] x [heads, N, L]: the query in latent space
        absorbed = torch.bmm(q_nope.transpose(0, 1).to(self._compute), self._k_up).transpose(0, 1)
        seen = self._cache.attend(step, torch.cat((absorbed.float(), q_rope), -1), self._spec.scale)
        return torch.bmm(seen.transpose(0, 1).to(self._compute), self._v_up).transpose(0, 1).float()
