"""What tells one source model from another, without reading all of it."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from ktcore.weights.checkpoint import Checkpoint
from ktcore.weights.packed.container import canonical, digest

SAMPLES = 16
SAMPLE_BYTES = 4096


def model_fingerprint(checkpoint: Checkpoint) -> str:
    """SHA-256 of the configuration (long arrays by their length) and of every tensor's name, shape and format."""
    tensors = [(i.name, list(i.shape), i.format) for i in checkpoint.tensors.values()]
    return digest(canonical([checkpoint.kind, _plain(dict(checkpoint.config)), sorted(tensors)]))


def files_fingerprint(checkpoint: Checkpoint) -> str:
    """SHA-256 of each file's name, size, time of change, and 16 pieces of 4 KiB spread over it."""
    parts = []
    for path in sorted({checkpoint.file_of(name) for name in checkpoint.tensors}):
        stat = path.stat()
        parts.append([path.name, stat.st_size, stat.st_mtime_ns, _sample(path, stat.st_size)])
    return digest(canonical(parts))


def _sample(path: Path, size: int) -> str:
    seen = hashlib.sha256()
    with path.open("rb") as file:
        for i in range(SAMPLES):
            file.seek(max(0, size - SAMPLE_BYTES) * i // (SAMPLES - 1))
            seen.update(file.read(SAMPLE_BYTES))
    return seen.hexdigest()


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (str, int, float, bool, type(None))):
        return value
    if isinstance(value, list) and len(value) < SAMPLE_BYTES:
        return [_plain(v) for v in value]
    return f"{len(value)} items" if hasattr(value, "__len__") else str(value)
