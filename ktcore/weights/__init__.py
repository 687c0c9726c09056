"""Reading weights: checkpoint files and folders, the formats their tensors are stored in, and plain fp32 from them."""

from __future__ import annotations

from ktcore.weights.checkpoint import Checkpoint, TensorInfo
from ktcore.weights.formats import WeightFormat, dequantize, get_format, known_formats, register_format, row_bytes
from ktcore.weights.open import open_checkpoint

__all__ = [
    "Checkpoint",
    "TensorInfo",
    "WeightFormat",
    "dequantize",
    "get_format",
    "known_formats",
    "open_checkpoint",
    "register_format",
    "row_bytes",
]
