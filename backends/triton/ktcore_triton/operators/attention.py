"""The attention branches, composed of the parts that the rules chose: grouped-query and latent."""

from __future__ import annotations

from typing import cast

from ktcore.backend import LoadRequest, Module
from ktcore.backend.branches import ATTENTION, MLA, AbsorbedLatents, attention_branch, mla_branch
from ktcore.backend.loading import compute_dtype, on_device
from ktcore.ops.attention import AttentionSpec
from ktcore.ops.mla import MLASpec
from ktcore_triton.operators.base import FLOAT_BYTES, HALF_BYTES, TritonImplementation


class TritonAttention(TritonImplementation):
    """Grouped-query attention: gates, sinks, temperature, norms before or after RoPE."""

    spec_type = AttentionSpec
    handles = ATTENTION | {"sinks"}

    def load(self, request: LoadRequest) -> Module:
        """Only sinks are its own: the parts hold the other weights."""
        return attention_branch(
            request, on_device(request, "sinks") if cast(AttentionSpec, request.spec).sinks else None
        )

    def packed_bytes(self, spec: AttentionSpec, stored_bytes: int) -> int:
        """Float32 of the sinks."""
        return FLOAT_BYTES * spec.heads * spec.sinks


class TritonMLA(TritonImplementation):
    """Latent attention, absorbed: keys are never expanded."""

    spec_type = MLASpec
    handles = MLA
    options = frozenset({"compute"})

    def load(self, request: LoadRequest) -> Module:
        """Bring the up-projections to the device, one matrix a head."""
        return mla_branch(request, AbsorbedLatents(request, compute_dtype(request)))

    def packed_bytes(self, spec: MLASpec, stored_bytes: int) -> int:
        """16 bits a value of the up-projections; the parts count themselves."""
        return HALF_BYTES * spec.heads * (spec.nope_dim + spec.value_dim) * spec.latent
