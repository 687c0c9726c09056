"""A checkpoint with headers only: reading any tensor fails the test."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from ktcore.weights import Checkpoint, TensorInfo, row_bytes


class Headers(Checkpoint):
    """Made from names and shapes (torch order)."""

    def __init__(
        self, kind: str, config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], fmt: str = "BF16"
    ) -> None:
        self.path = Path("model.gguf" if kind == "gguf" else "model")
        self.kind = kind
        self.config = dict(config)
        self.tensors = {
            name: TensorInfo(name, shape, fmt, prod(shape[:-1]) * row_bytes(fmt, shape[-1]))
            for name, shape in shapes.items()
        }

    def raw(self, name: str) -> np.ndarray:
        raise AssertionError(f"a graph is made from headers, but '{name}' was read")

    def release(self, name: str) -> None:
        raise AssertionError("nothing to release")

    def close(self) -> None:
        pass
