"""Packed weights on disk: the layouts that backends compute from, written once and mapped read-only ever after."""

from __future__ import annotations

from ktcore.weights.packed.parts import PackedParts

__all__ = ["PackedParts"]
