"""The condition of a rule: which nodes it is about."""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatchcase

from ktcore.backend.capabilities import Capabilities
from ktcore.graph.node import Node

Span = tuple[int, int | None]
"""Layers first..last, both included; None is the last one of the model."""


@dataclass(frozen=True)
class Match:
    """All criteria that are given must hold; none given matches every node.

    Attributes:
        op: operators, any of them.
        name: globs on the node's name, any of them; "*" crosses dots.
        layers: spans of layer indices; nodes outside of layers never match.
        format: globs on weight formats; every format of the node and its parts must fit one.
        feature: features that the device must declare, all of them.
        family: model families (or architecture names), any of them.
    """

    op: tuple[str, ...] = ()
    name: tuple[str, ...] = ()
    layers: tuple[Span, ...] = ()
    format: tuple[str, ...] = ()
    feature: tuple[str, ...] = ()
    family: tuple[str, ...] = ()

    def covers(self, node: Node, families: tuple[str, ...], device: Capabilities) -> bool:
        """Whether `node` meets the condition, on the device that the rule would put it on."""
        if self.op and node.spec.op not in self.op:
            return False
        if self.family and not set(self.family) & set(families):
            return False
        if self.layers and not _in_spans(node.layer, self.layers):
            return False
        if self.name and not any(fnmatchcase(node.name, glob) for glob in self.name):
            return False
        if self.format:
            formats = node.spec.formats()
            if not formats or not all(any(fnmatchcase(f, glob) for glob in self.format) for f in formats):
                return False
        return all(device.has(feature) for feature in self.feature)

    def includes(self, other: Match) -> bool:
        """Whether every node that meets `other` surely meets this, whatever the model; may miss some cases."""
        return (
            _any_of(self.op, other.op)
            and _any_of(self.family, other.family)
            and (self.name in ((), ("*",)) or _any_of(self.name, other.name))
            and _any_of(self.format, other.format)
            and _spans_within(other.layers, self.layers)
            and set(self.feature) <= set(other.feature)
        )


def parse_layers(text: str) -> tuple[Span, ...]:
    """Spans of "3-60", "0,2,5-7" or "3-" (to the end).

    Raises:
        ValueError: malformed.
    """
    spans: list[Span] = []
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        start = int(first)
        end: int | None = start
        if dash:
            end = int(last) if last.strip() else None
        if start < 0 or (end is not None and end < start):
            raise ValueError(f"'{part.strip()}' runs backwards")
        spans.append((start, end))
    return tuple(spans)


def _in_spans(layer: int | None, spans: tuple[Span, ...]) -> bool:
    return layer is not None and any(a <= layer and (b is None or layer <= b) for a, b in spans)


def _any_of(wide: tuple[str, ...], narrow: tuple[str, ...]) -> bool:
    return not wide or (bool(narrow) and set(narrow) <= set(wide))


def _spans_within(narrow: tuple[Span, ...], wide: tuple[Span, ...]) -> bool:
    if not wide:
        return True
    return bool(narrow) and all(
        any(wa <= a and (wb is None or (b is not None and b <= wb)) for wa, wb in wide) for a, b in narrow
    )
