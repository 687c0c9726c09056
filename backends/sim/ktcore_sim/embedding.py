"""Token embedding: rows of a table on the device."""

from __future__ import annotations

import torch

from ktcore.backend import LoadRequest, Module
from ktcore.backend.loading import embedding_rows
from ktcore.ops.embedding import EmbeddingSpec
from ktcore_sim.base import FLOAT_BYTES, SimImplementation


class SimEmbedding(SimImplementation):
    """One gather. An id beyond the table is an error that surfaces late."""

    id = "sim.embedding"
    spec_type = EmbeddingSpec
    handles = frozenset({"scale"})

    def load(self, request: LoadRequest) -> Module:
        """Dequantise the table."""
        return embedding_rows(request, torch.float32)

    def packed_bytes(self, spec: EmbeddingSpec, stored_bytes: int) -> int:
        """Float32."""
        return FLOAT_BYTES * spec.vocab * spec.hidden
