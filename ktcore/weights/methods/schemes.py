"""Which scheme of a compressed-tensors configuration quantises a module: groups with targets, and names to ignore."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ktcore.errors import CheckpointError
from ktcore.weights.checkpoint import Checkpoint

FORMATS = (
    "pack-quantized",
    "int-quantized",
    "float-quantized",
    "naive-quantized",
    "mxfp4-pack-quantized",
    "nvfp4-pack-quantized",
    "mxfp8-quantized",
    "mixed-precision",
)

ORDERS = {"group": True, "dynamic": True, True: True, "weight": False, "static": False, False: False, None: False}
"""`actorder`, and whether columns then belong to the groups that `weight_g_idx` says (quantization/quant_args.py)."""


@dataclass(frozen=True)
class Scheme:
    """How a group's weights are stored; the fields are those of `weights` in a config group.

    Attributes:
        ordered: columns belong to the groups that `weight_g_idx` gives them.
    """

    bits: int
    kind: str
    symmetric: bool
    strategy: str
    group_size: int | None
    block: tuple[int, int] | None
    ordered: bool


class Schemes:
    """All groups of a configuration.

    Raises:
        CheckpointError: a format, or sparsity, that is not supported.
    """

    def __init__(self, checkpoint: Checkpoint, config: Mapping[str, Any]) -> None:
        self._where = f"{checkpoint.path}: quantization_config"
        name = config.get("format")
        if name is not None and name not in FORMATS:
            raise CheckpointError(
                f"{self._where}: compressed-tensors format '{name}' is not supported",
                f"supported: {', '.join(FORMATS)}",
            )
        sparsity = config.get("sparsity_config")
        if isinstance(sparsity, Mapping) and sparsity.get("format", "dense") != "dense":
            raise CheckpointError(f"{self._where}: sparse weights ('{sparsity['format']}') are not supported")
        if config.get("transform_config"):
            raise CheckpointError(f"{self._where}: weights behind a transform are not supported")
        groups = config.get("config_groups")
        if not isinstance(groups, Mapping) or not groups:
            raise CheckpointError(f"{self._where} has no config_groups")
        self._schemes: dict[str, Scheme] = {}
        for key, group in groups.items():
            self._schemes |= dict.fromkeys(_strings(group, "targets"), self._scheme(key, group))
        expressions = sorted(target for target in self._schemes if target.startswith("re:"))
        self._patterns = [(self._pattern(target), self._schemes[target]) for target in expressions]

    def of(self, module: str) -> Scheme:
        """The scheme of a module, by its target as compressed-tensors chooses it (utils/match.py, match_targets).

        A target that is the module's name comes first, then expressions in the order of their letters, then classes.
        Where two groups have the same target the later one counts.

        Raises:
            CheckpointError: no group's targets cover it, or only classes of which it may be either.
        """
        found = self._schemes.get(module)
        if found is not None:
            return found
        for pattern, scheme in self._patterns:
            if pattern.match(module):
                return scheme
        for name in ("Embedding" if module.endswith("embed_tokens") else "Linear", "Module"):
            if name in self._schemes:
                return self._schemes[name]
        by_class = {scheme for target, scheme in self._schemes.items() if _is_class(target)}
        if len(by_class) != 1:
            told = "no group" if not by_class else "several groups"
            raise CheckpointError(f"{self._where}: {told} of config_groups cover '{module}', which is quantised")
        return by_class.pop()

    def _scheme(self, key: str, group: Any) -> Scheme:
        weights = group.get("weights") if isinstance(group, Mapping) else None
        if not isinstance(weights, Mapping):
            raise CheckpointError(f"{self._where}: config_groups.{key} says nothing about weights")
        bits, kind = weights.get("num_bits"), weights.get("type", "int")
        supported = {"int": range(1, 9), "float": (4, 8)}.get(kind) if isinstance(kind, str) else None
        if type(bits) is not int or supported is None or bits not in supported:
            raise CheckpointError(
                f"{self._where}: config_groups.{key} has {kind} weights of {bits!r} bits",
                "supported: integers of 1 to 8 bits, floats of 4 and 8",
            )
        order = weights.get("actorder")
        order = order.lower() if isinstance(order, str) else order
        if order not in ORDERS:
            raise CheckpointError(
                f"{self._where}: config_groups.{key} has actorder {order!r}, which is not known",
                f"known: {', '.join(map(str, ORDERS))}",
            )
        return Scheme(
            bits=bits,
            kind=kind,
            symmetric=bool(weights.get("symmetric", True)),
            strategy=str(weights.get("strategy")),
            group_size=weights.get("group_size"),
            block=_block(weights),
            ordered=ORDERS[order],
        )

    def _pattern(self, target: str) -> re.Pattern[str]:
        try:
            return re.compile(target.removeprefix("re:"))
        except re.error as error:
            raise CheckpointError(f"{self._where}: target {target!r} is no regular expression: {error}") from None


def _block(weights: Mapping[str, Any]) -> tuple[int, int] | None:
    """Rows and columns that share a float code's scale; None for those of rows and tensors."""
    structure, size = weights.get("block_structure"), weights.get("group_size")
    if isinstance(structure, list) and len(structure) == 2:
        return structure[0], structure[1]
    return (1, size) if type(size) is int and size > 0 else None


def _strings(group: Any, key: str) -> list[str]:
    values = group.get(key) if isinstance(group, Mapping) else None
    return [v for v in values if isinstance(v, str)] if isinstance(values, list) else []


def _is_class(target: str) -> bool:
    """Whether a target is a module's class ("Linear"), not a name ("lm_head")."""
    return target.isidentifier() and target[0].isupper()
