"""The graph's operators over the Triton kernels; each backend lists them under its own name, with its own tuning.

Importing this needs no Triton: plans are made without it, and `supports` says where it is missing.
"""

from __future__ import annotations

from ktcore.backend import Implementation
from ktcore_triton.tuning import Tuned, Tuning


def implementations(backend: str, tuning: Tuned | None = None) -> list[Implementation]:
    """One implementation "`backend`.<operator>" of every operator that the shared kernels cover."""
    from ktcore_triton.operators.attention import TritonAttention, TritonMLA
    from ktcore_triton.operators.blocks import TritonBlockIndexCache, TritonBlockIndexer
    from ktcore_triton.operators.cache import TritonKVCache
    from ktcore_triton.operators.delta import TritonGatedDeltaNet, TritonStateCache
    from ktcore_triton.operators.float8 import TritonFloat8Linear
    from ktcore_triton.operators.index import TritonIndexCache, TritonTokenIndexer
    from ktcore_triton.operators.linear import TritonLinear
    from ktcore_triton.operators.moe import TritonExperts, TritonMoE, TritonRouter
    from ktcore_triton.operators.simple import TritonEmbedding, TritonMLP, TritonRMSNorm, TritonRope
    from ktcore_triton.operators.streams import (
        TritonGatedStreams,
        TritonHyperConnection,
        TritonStreamBranch,
        TritonStreamEnd,
    )

    kinds = (
        TritonEmbedding,
        TritonLinear,
        TritonRMSNorm,
        TritonRope,
        TritonKVCache,
        TritonAttention,
        TritonMLA,
        TritonIndexCache,
        TritonTokenIndexer,
        TritonBlockIndexCache,
        TritonBlockIndexer,
        TritonMLP,
        TritonRouter,
        TritonExperts,
        TritonMoE,
        TritonStateCache,
        TritonGatedDeltaNet,
        TritonHyperConnection,
        TritonGatedStreams,
        TritonStreamBranch,
        TritonStreamEnd,
        TritonFloat8Linear,
    )
    return [kind(backend, tuning or Tuning()) for kind in kinds]
