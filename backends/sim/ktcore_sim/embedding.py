"""Token embedding: rows of a table on the device."""

from __future__ import annotations

import torch

from ktcore.backend import LoadRequest
from ktcore.backend.mirror import upload
from ktcore.ops.embedding import EmbeddingSpec
from ktcore_sim.base import FLOAT_BYTES, SimImplementation, weight


class SimEmbedding(SimImplementation):
    """One gather. An id beyond the table is an error that surfaces late."""

    id = "sim.embedding"
    spec_type = EmbeddingSpec

    def load(self, request: LoadRequest) -> SimEmbeddingModule:
        """Dequantise the table."""
        return SimEmbeddingModule(request)

    def packed_bytes(self, spec: EmbeddingSpec, stored_bytes: int) -> int:
        """Float32."""
        return FLOAT_BYTES * spec.vocab * spec.hidden


class SimEmbeddingModule:
    """ids int64 [T], on the device or the host -> float32 [T, hidden]."""

    def __init__(self, request: LoadRequest) -> None:
        self._runtime = request.runtime
        self._table = weight(request, "weight")

    def __call__(self, ids: torch.Tensor) -> torch.Tensor:
        if ids.device != self._table.device:
            ids = upload(self._runtime, ids)
        return self._table.index_select(0, ids)
