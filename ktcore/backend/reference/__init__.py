"""The operators' references as implementations: always correct, never fast, on any torch device."""

from __future__ import annotations

from ktcore.backend.implementation import Implementation
from ktcore.backend.reference.attention import (
    ReferenceAttention,
    ReferenceBlockIndexer,
    ReferenceMLA,
    ReferenceTokenIndexer,
)
from ktcore.backend.reference.block_index import ReferenceBlockIndexCache
from ktcore.backend.reference.cache import ReferenceIndexCache, ReferenceKVCache
from ktcore.backend.reference.compressed import (
    ReferenceCompressedAttention,
    ReferenceEntryCache,
    ReferenceEntryIndexer,
    ReferenceWindowCache,
)
from ktcore.backend.reference.kda import ReferenceKimiDelta
from ktcore.backend.reference.linear_attention import ReferenceGatedDeltaNet, ReferenceStateCache
from ktcore.backend.reference.moe import ReferenceExperts, ReferenceMoE, ReferenceRouter
from ktcore.backend.reference.ngram import ReferenceNGram, ReferenceNGramTable, ReferencePreceded
from ktcore.backend.reference.simple import (
    ReferenceEmbedding,
    ReferenceLinear,
    ReferenceMLP,
    ReferenceRMSNorm,
    ReferenceRope,
    ReferenceSampling,
)
from ktcore.backend.reference.streams import (
    ReferenceGatedStreams,
    ReferenceHyperConnection,
    ReferenceStreamBranch,
    ReferenceStreamEnd,
)

__all__ = ["reference_implementations"]


def reference_implementations() -> list[Implementation]:
    """One implementation of every operator, ids "reference.<operator>"."""
    return [
        ReferenceEmbedding(),
        ReferenceLinear(),
        ReferenceRMSNorm(),
        ReferenceRope(),
        ReferenceAttention(),
        ReferenceMLA(),
        ReferenceMLP(),
        ReferenceRouter(),
        ReferenceExperts(),
        ReferenceMoE(),
        ReferenceKVCache(),
        ReferenceTokenIndexer(),
        ReferenceIndexCache(),
        ReferenceBlockIndexer(),
        ReferenceBlockIndexCache(),
        ReferenceGatedDeltaNet(),
        ReferenceKimiDelta(),
        ReferenceStateCache(),
        ReferenceHyperConnection(),
        ReferenceGatedStreams(),
        ReferenceStreamBranch(),
        ReferenceStreamEnd(),
        ReferenceCompressedAttention(),
        ReferenceEntryIndexer(),
        ReferenceWindowCache(),
        ReferenceEntryCache(),
        ReferenceNGramTable(),
        ReferenceNGram(),
        ReferencePreceded(),
        ReferenceSampling(),
    ]
