"""How weights get to a device, for implementations that hold them there as torch tensors."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import torch

from ktcore.backend.implementation import LoadRequest
from ktcore.backend.mirror import upload
from ktcore.ops.embedding import EmbeddingSpec

COMPUTE = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
"""Values of a rule's option `compute`."""


def compute_dtype(request: LoadRequest) -> torch.dtype:
    """The type that products run in: the option `compute`, else bfloat16 where the device has it, else float16."""
    asked = request.options.get("compute")
    if asked is not None:
        return COMPUTE[asked]
    return torch.bfloat16 if request.device.has("bf16") else torch.float16


def on_device(request: LoadRequest, role: str, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """A weight, dequantised, on the device."""
    return request.weights[role].tensor().to(dtype).to(request.runtime.device)


def optional(request: LoadRequest, role: str, dtype: torch.dtype = torch.float32) -> torch.Tensor | None:
    """The same; None when the node has no such weight."""
    return on_device(request, role, dtype) if role in request.weights else None


def embedding_rows(request: LoadRequest, dtype: torch.dtype) -> Callable[[torch.Tensor], torch.Tensor]:
    """ids int64 [T], on the device or the host -> float32 [T, hidden], from a table held in `dtype`; an implementation
    that loads it handles `scale`."""
    runtime, table = request.runtime, on_device(request, "weight", dtype)
    scale = cast(EmbeddingSpec, request.spec).scale

    def run(ids: torch.Tensor) -> torch.Tensor:
        ids = ids if ids.device == table.device else upload(runtime, ids)
        rows = table.index_select(0, ids).float()
        return rows if scale == 1.0 else rows * scale

    return run
