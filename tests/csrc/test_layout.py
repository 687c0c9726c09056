"""Packed panels on a disk outlive the build that wrote them: a change of their layout raises its version."""

from __future__ import annotations

import hashlib
import zlib

import numpy as np
from ktcore_cpu import _native, packing

PINNED = ("cpu.panels/3", "0ef83500eb3068b7")
PINNED_FAST = "c90185a5e2e1e572"
"""Of lattice points packed as codes (`packing: fast`)."""
ROWS, COLS = 40, 512


def _digest(pool: _native.Pool, fast: bool) -> str:
    found = hashlib.sha256()
    for name, (block, size) in sorted(_native.formats().items()):
        if name.endswith("_FAST") != fast:
            continue
        raw = np.random.default_rng(zlib.crc32(name.encode())).integers(0, 256, (ROWS, COLS // block * size), np.uint8)
        found.update(name.encode() + _native.PackedMatrix.pack(pool, name, ROWS, COLS, raw).packed.tobytes())
    return found.hexdigest()[:16]


def test_bytes_of_panels_are_those_of_the_version(pool: _native.Pool) -> None:
    """Where this fails and the change is meant: raise `packing.LAYOUT`, then write both down above."""
    assert (packing.LAYOUT, _digest(pool, fast=False)) == PINNED
    assert _digest(pool, fast=True) == PINNED_FAST
