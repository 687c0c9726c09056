"""The option `packing`: which weight formats take more memory where that makes them quicker to read, and how much."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ktcore.backend import Implementation, LoadRequest
from ktcore.errors import CheckpointError

COMPACT, FAST = "compact", "fast"
SUFFIX = "_FAST"
"""Of the native formats whose panels hold a code for each value of a lattice point (csrc/core/types.h)."""
PERMUTING = frozenset({"avx512_bf16", "amx"})
"""Instruction sets that look lattice points up in registers, where most formats are quickest as they are."""
PAYS_THERE = frozenset({"IQ1_S", "IQ2_S"})
"""What is quicker as codes there too, by docs/cpu-kernels.md."""


class Packs(Implementation):
    """An implementation whose option `packing` says how the matrices that it packs lie in memory."""

    def packings(self, spec: Any, stored: Mapping[str, int]) -> Mapping[str, int]:
        """The same bytes but for formats that have a quicker form on this machine."""
        compact = max(
            self.packed_bytes(spec, sum(stored.values())), sum(_packed(f, size) for f, size in stored.items())
        )
        more = sum(_packed(fast_format(f), size) - _packed(f, size) for f, size in stored.items())
        return {COMPACT: compact, FAST: compact + more}


def packed_format(request: LoadRequest, format: str) -> str:
    """The native format that the rule's option `packing` packs weights of `format` in.

    Raises:
        CheckpointError: the option says neither "compact" nor "fast".
    """
    wanted = request.options.get("packing", COMPACT)
    if wanted not in (COMPACT, FAST):
        raise CheckpointError(f"{request.name}: option packing={wanted!r}, known are {COMPACT} and {FAST}")
    return fast_format(format) if wanted == FAST else format


def fast_format(format: str) -> str:
    """The form of a weight format that the instruction set in use reads quickest: itself, or one of more bytes."""
    from ktcore_cpu import _native

    fast = format + SUFFIX
    if fast not in _native.formats() or (_native.isa_selected() in PERMUTING and format not in PAYS_THERE):
        return format
    return fast


def _packed(format: str, size: int) -> int:
    """Bytes that `size` bytes of the checkpoint take as panels of a native format."""
    from ktcore_cpu import _native

    return round(size * _native.packed_growth(format)) if format in _native.formats() else size
