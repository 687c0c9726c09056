"""The option `packing`: weights may take more memory where that lets them be read more quickly."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ktcore.backend.implementation import Implementation
from ktcore.errors import PlanError
from ktcore.graph.node import Node
from ktcore.ops.base import Spec
from ktcore.rules.schema import Rule

OPTION = "packing"
PACKINGS = ("compact", "fast")
"""What it may say. The first is the default: about the bytes of the file."""


def check_packing(packing: str | None) -> None:
    """PlanError where somebody asks for a packing that there is not."""
    if packing is not None and packing not in PACKINGS:
        raise PlanError(f"packing {packing!r} is unknown", f"known: {', '.join(PACKINGS)}")


def with_packing(options: Mapping[str, Any], implementation: Implementation, packing: str | None) -> Mapping[str, Any]:
    """A rule's options, with `packing` where it does not say one and the implementation knows it."""
    return {OPTION: packing, **options} if packing is not None and OPTION in implementation.options else options


def sizes(implementation: Implementation, spec: Spec, node: Node, fused: bool, share: float) -> Mapping[str, int]:
    """Device bytes of the node by packing; nothing where there is one way.

    Args:
        share: the part of the node's weights that is meant.
    """
    if OPTION not in implementation.options:
        return {}
    stored: dict[str, float] = {}
    for part in node.walk() if fused else [node]:
        for ref in part.weights.values():
            stored[ref.format] = stored.get(ref.format, 0) + ref.nbytes * share
    return implementation.packings(spec, {name: round(count) for name, count in stored.items()})


def packed_size(rule: Rule, options: Mapping[str, Any], sizes: Mapping[str, int], otherwise: int) -> int:
    """Device bytes under the packing that `options` say or the default; `otherwise` where there is one way.

    Raises:
        RuleError: there is no such packing.
    """
    if not sizes:
        return otherwise
    wanted = options.get(OPTION, PACKINGS[0])
    if wanted not in sizes:
        raise rule.where.error(
            f"rule '{rule.name}': option {OPTION}={wanted!r} is unknown", f"known: {', '.join(PACKINGS)}"
        )
    return sizes[wanted]
