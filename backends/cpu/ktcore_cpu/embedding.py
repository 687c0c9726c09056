"""Token embedding that dequantises rows straight from the memory-mapped file: the table is never copied."""

from __future__ import annotations

from typing import cast

import torch

from ktcore.backend import Capabilities, Implementation, LoadRequest, Supported, Unsupported
from ktcore.errors import RequestError
from ktcore.ops.embedding import EmbeddingSpec
from ktcore_cpu import packing


class CpuEmbedding(Implementation):
    """Keeps a view of the file; each call reads the rows it needs."""

    id = "cpu.embedding"
    spec_type = EmbeddingSpec
    handles = frozenset({"scale"})

    def supports(self, spec: EmbeddingSpec, device: Capabilities) -> Supported | Unsupported:
        """Every native weight format."""
        return packing.supports_formats(spec)

    def packed_bytes(self, spec: EmbeddingSpec, stored_bytes: int) -> int:
        """None: the file's own pages serve, and the system may drop them."""
        return 0

    def load(self, request: LoadRequest) -> CpuEmbeddingModule:
        """Map the table."""
        return CpuEmbeddingModule(request)


class CpuEmbeddingModule:
    """int64 [T] -> float32 [T, hidden]."""

    def __init__(self, request: LoadRequest) -> None:
        from ktcore_cpu import _native

        weight = request.weights["weight"]
        self._call = _native.dequantize_rows
        self._format = weight.format
        self._table = weight.raw()
        self._vocab, self._hidden = weight.shape
        self._scale = cast(EmbeddingSpec, request.spec).scale

    def __call__(self, ids: torch.Tensor) -> torch.Tensor:
        out = torch.empty(ids.shape[0], self._hidden)
        table = self._table
        try:
            self._call(
                self._format,
                table.ctypes.data,
                table.shape[1],
                self._vocab,
                self._hidden,
                ids.long().numpy(),
                out.data_ptr(),
            )
        except ValueError as error:
            raise RequestError(f"token ids do not fit the vocabulary of {self._vocab}: {error}") from error
        return out if self._scale == 1.0 else out.mul_(self._scale)
