"""The attention branches, composed of the parts that the rules chose: grouped-query and latent."""

from __future__ import annotations

import torch

from ktcore.backend import LoadRequest, Module
from ktcore.backend.branches import (
    ATTENTION,
    INDEXER,
    MLA,
    AbsorbedLatents,
    attention_branch,
    indexer_branch,
    mla_branch,
)
from ktcore.backend.loading import on_device
from ktcore.ops.attention import AttentionSpec
from ktcore.ops.indexer import TokenIndexerSpec
from ktcore.ops.mla import MLASpec
from ktcore_sim.base import FLOAT_BYTES, SimImplementation


class SimAttention(SimImplementation):
    """Grouped-query attention."""

    id = "sim.attention"
    spec_type = AttentionSpec
    handles = ATTENTION - {"gate", "head_gate", "norm_after_rope", "temperature", "temperature.offset", "indexer"}

    def load(self, request: LoadRequest) -> Module:
        """Nothing to pack: the parts hold the weights."""
        return attention_branch(request)


class SimMLA(SimImplementation):
    """Latent attention, absorbed: keys are never expanded."""

    id = "sim.mla"
    spec_type = MLASpec
    handles = MLA

    def load(self, request: LoadRequest) -> Module:
        """Bring the up-projections to the device, one matrix a head."""
        return mla_branch(request, AbsorbedLatents(request, torch.float32))

    def packed_bytes(self, spec: MLASpec, stored_bytes: int) -> int:
        """Float32 of the up-projections; the parts count themselves."""
        return FLOAT_BYTES * spec.heads * (spec.nope_dim + spec.value_dim) * spec.latent


class SimTokenIndexer(SimImplementation):
    """Chooses the tokens of sparse attention; composed of projections, rotation and a cache of its own."""

    id = "sim.token_indexer"
    spec_type = TokenIndexerSpec
    handles = INDEXER

    def load(self, request: LoadRequest) -> Module:
        """Bring the LayerNorm's weights to the device."""
        return indexer_branch(request, on_device(request, "k_norm"), on_device(request, "k_norm_bias"))

    def packed_bytes(self, spec: TokenIndexerSpec, stored_bytes: int) -> int:
        """Float32 of the LayerNorm; the parts count themselves."""
        return FLOAT_BYTES * 2 * spec.head_dim
