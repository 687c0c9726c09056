"""A config.json without its weights as a checkpoint: enough to plan a model that nobody has downloaded yet."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ktcore.errors import CheckpointError
from ktcore.weights.checkpoint import Checkpoint, TensorInfo
from ktcore.weights.formats import get_format, row_bytes
from ktcore.weights.safetensors import read_json

DTYPES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}
ALWAYS_BIASED = frozenset({"qwen2", "qwen2_moe"})
"""Families whose q, k and v have biases although their config.json has no key for it."""


class BareCheckpoint(Checkpoint):
    """Holds whatever tensors its configuration asks for, in the shapes it asks for, and no bytes.

    Matrices have the format `weights`; what cannot (a row that is no whole number of blocks, and vectors) has that of
    config.json's `dtype`, as it is in quantised files.

    Attributes:
        quantised: the quantisation method that config.json names, "" for none; it is not planned for.
    """

    def __init__(self, path: Path, config: Mapping[str, Any], weights: str | None = None) -> None:
        section = config.get("quantization_config")
        method = section.get("quant_method") if isinstance(section, Mapping) else section
        dtype = config.get("dtype") or config.get("torch_dtype") or "bfloat16"
        if dtype not in DTYPES:
            raise CheckpointError(f"{path}: dtype {dtype!r} is unknown", f"known: {', '.join(DTYPES)}")
        self.path = path
        self.kind = "hf"
        self.config = {key: value for key, value in config.items() if key != "quantization_config"}
        self.tensors = self._tensors = dict[str, TensorInfo]()
        self.quantised = str(method or "")
        self._plain = DTYPES[dtype]
        self._format = get_format(weights) if weights else get_format(self._plain)

    def holds(self, name: str) -> bool:
        return name in self.tensors or (name.endswith(".bias") and self._biased(name.split(".")[-2]))

    def expect(self, name: str, shape: tuple[int, ...]) -> None:
        whole = len(shape) > 1 and shape[-1] % self._format.block_size == 0
        fmt = self._format.name if whole else self._plain
        rows = 1
        for n in shape[:-1]:
            rows *= n
        self._tensors[name] = TensorInfo(name, shape, fmt, rows * row_bytes(fmt, shape[-1]))

    def raw(self, name: str) -> npt.NDArray[np.uint8]:
        raise CheckpointError(f"{self.path}: holds no weights, so it can be planned but not loaded")

    def release(self, name: str) -> None:
        """Nothing to release."""

    def close(self) -> None:
        """Nothing to close."""

    def _biased(self, projection: str) -> bool:
        kind = self.config.get("model_type")
        if projection in ("q_proj", "k_proj", "v_proj"):
            return bool(self.config.get("qkv_bias", self.config.get("attention_bias", kind in ALWAYS_BIASED)))
        if projection == "o_proj":
            return bool(self.config.get("attention_bias")) and not str(kind).startswith("glm4")
        return False


def open_config(path: Path, weights: str | None = None) -> BareCheckpoint:
    """A config.json alone.

    Args:
        weights: format that matrices are taken to be stored in; None is what config.json says, or bfloat16.

    Raises:
        CheckpointError: no such file, not a JSON object, or an unknown format.
    """
    return BareCheckpoint(path, read_json(path), weights)
