"""Operator interfaces: one file an operator, with its spec (what is computed) and its reference in float32 torch."""

from ktcore.ops.attention import AttentionSpec, Temperature
from ktcore.ops.base import Spec
from ktcore.ops.batch import StepBatch
from ktcore.ops.block_indexer import BlockIndexCacheSpec, BlockIndexerSpec
from ktcore.ops.compressed import CompressedAttentionSpec, EntryCacheSpec, EntryIndexerSpec, WindowCacheSpec
from ktcore.ops.embedding import EmbeddingSpec
from ktcore.ops.indexer import IndexCacheSpec, TokenIndexerSpec
from ktcore.ops.kda import KimiDeltaSpec
from ktcore.ops.kv_cache import KVCacheSpec
from ktcore.ops.linear import LinearSpec
from ktcore.ops.linear_attention import GatedDeltaNetSpec, StateCacheSpec
from ktcore.ops.mla import MLASpec
from ktcore.ops.mlp import ClampedGLU, MLPSpec
from ktcore.ops.moe import ExpertsSpec, MoESpec, RouterSpec
from ktcore.ops.ngram import NGramSpec, NGramTableSpec, PrecededSpec
from ktcore.ops.norm import RMSNormSpec
from ktcore.ops.rope import RopeScaling, RopeSpec
from ktcore.ops.sampling import SamplingParams, SamplingSpec
from ktcore.ops.streams import GatedStreamsSpec, HyperConnectionSpec, StreamBranchSpec, StreamEndSpec

__all__ = [
    "AttentionSpec",
    "BlockIndexCacheSpec",
    "BlockIndexerSpec",
    "ClampedGLU",
    "CompressedAttentionSpec",
    "EmbeddingSpec",
    "EntryCacheSpec",
    "EntryIndexerSpec",
    "ExpertsSpec",
    "GatedDeltaNetSpec",
    "GatedStreamsSpec",
    "HyperConnectionSpec",
    "IndexCacheSpec",
    "KVCacheSpec",
    "KimiDeltaSpec",
    "LinearSpec",
    "MLASpec",
    "MLPSpec",
    "MoESpec",
    "NGramSpec",
    "NGramTableSpec",
    "PrecededSpec",
    "RMSNormSpec",
    "RopeScaling",
    "RopeSpec",
    "RouterSpec",
    "SamplingParams",
    "SamplingSpec",
    "Spec",
    "StateCacheSpec",
    "StepBatch",
    "StreamBranchSpec",
    "StreamEndSpec",
    "Temperature",
    "TokenIndexerSpec",
    "WindowCacheSpec",
]
