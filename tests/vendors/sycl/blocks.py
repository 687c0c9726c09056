"""Random stored rows with moderate scales, as in checkpoints: any bytes but the 16-bit floats."""

from __future__ import annotations

import numpy as np

from ktcore.weights import get_format

HALVES = {"Q4_1": (0, 2), "Q5_1": (0, 2), "Q2_K": (80, 82), "Q3_K": (108,), "Q4_K": (0, 2), "Q5_K": (0, 2)}


def random_rows(name: str, rows: int, cols: int, seed: int = 0) -> np.ndarray:
    """uint8 [rows, bytes]: random blocks of a GGUF format with moderate scales."""
    fmt = get_format(name)
    rng = np.random.default_rng([seed, rows, cols])
    blocks = rng.integers(0, 256, (rows, cols // fmt.block_size, fmt.block_bytes), dtype=np.uint8)
    for at in HALVES.get(name, (208,) if name == "Q6_K" else (0,)):
        blocks[..., at : at + 2] = (rng.uniform(-2, 2, blocks.shape[:2]) / 256).astype("<f2")[..., None].view(np.uint8)
    return blocks.reshape(rows, -1)
