"""What every operator spec has in common: a frozen description of *what* is computed, with nested specs as children."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import ClassVar


@dataclass(frozen=True)
class Spec:
    """Base of all operator specs.

    A spec names shapes, formats and constants and never an implementation. A composite operator (attention, MLP, MoE)
    holds the specs of its parts in fields; `children()` lists them, and a rule can choose an implementation for the
    whole (a fused one) or for each part.
    """

    op: ClassVar[str] = "?"

    def children(self) -> dict[str, Spec]:
        """Role -> spec of every part that is an operator itself, in field order; absent (None) parts are left out."""
        parts: dict[str, Spec] = {}
        for f in fields(self):
            value = getattr(self, f.name)
            if isinstance(value, Spec):
                parts[f.name] = value
        return parts

    def formats(self) -> tuple[str, ...]:
        """Weight formats of this operator and all of its parts, sorted, without repeats."""
        found: set[str] = set()
        for f in fields(self):
            value = getattr(self, f.name)
            if isinstance(value, Spec):
                found.update(value.formats())
            elif f.name.endswith("_format") and value:
                found.add(value)
        return tuple(sorted(found))
