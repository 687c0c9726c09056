"""The attention branches, composed of the parts that the rules chose: grouped-query and latent."""

from __future__ import annotations

from typing import cast

import torch

from ktcore.backend import LoadRequest, Module
from ktcore.backend.branches import ATTENTION, MLA, AbsorbedLatents, attention_branch, mla_branch
from ktcore.backend.loading import compute_dtype, on_device
from ktcore.ops.attention import AttentionSpec
from ktcore.ops.mla import MLASpec
from ktcore_npu.operators.base import FLOAT_BYTES, HALF_BYTES, NpuImplementation


class NpuAttention(NpuImplementation):
    """Grouped-query attention: gates, temperature, norms before or after RoPE; sinks where the cache takes them."""

    spec_type = AttentionSpec
    handles = ATTENTION | {"sinks"}

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
    handles = MLA
    options = frozenset({"compute"})

    def load(self, request: LoadRequest) -> Module:
        """Bring the up-projections to the device, one matrix a head."""
        in_float32 = cast(MLASpec, request.spec).kv_b_format == "F32"
        return mla_branch(request, AbsorbedLatents(request, torch.float32 if in_float32 else compute_dtype(request)))

    def packed_bytes(self, spec: MLASpec, stored_bytes: int) -> int:
        """16 bits a value of the up-projections, 32 of such ones; the parts count themselves."""
        return (
            (FLOAT_BYTES if spec.kv_b_format == "F32" else HALF_BYTES)
            * spec.heads
            * (spec.nope_dim + spec.value_dim)
            * spec.latent
        )
