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
    "mixed-precision",
)


@dataclass(frozen=True)
class Scheme:
    """How a group's weights are stored; the fields are those of `weights` in a config group."""

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
        self._groups = [(_strings(group, "targets"), self._scheme(key, group)) for key, group in groups.items()]

    def of(self, module: str) -> Scheme:
        """The scheme of a module: one whose target names it, else one for its class.

        Raises:
            CheckpointError: no group's targets cover it, or several classes' do.
        """
        for targets, scheme in self._groups:
            if any(_names(target, module) for target in targets):
                return scheme
        by_class = {scheme for targets, scheme in self._groups if any(_is_class(target) for target in targets)}
        if len(by_class) != 1:
            found = "no group" if not by_class else "several groups"
            raise CheckpointError(f"{self._where}: {found} of config_groups cover '{module}', which is quantised")
        return by_class.pop()

    def _scheme(self, key: str, group: Any) -> Scheme:
        weights = group.get("weights") if isinstance(group, Mapping) else None
        if not isinstance(weights, Mapping):
            raise CheckpointError(f"{self._where}: config_groups.{key} says nothing about weights")
        bits, kind = weights.get("num_bits"), weights.get("type", "int")
        if bits not in (4, 8) or kind not in ("int", "float"):
            raise CheckpointError(
                f"{self._where}: config_groups.{key} has {kind} weights of {bits!r} bits", "supported: 4 and 8"
            )
        structure = weights.get("block_structure")
        return Scheme(
            bits=bits,
            kind=kind,
            symmetric=bool(weights.get("symmetric", True)),
            strategy=str(weights.get("strategy")),
            group_size=weights.get("group_size"),
            block=tuple(structure) if isinstance(structure, list) and len(structure) == 2 else None,
            ordered=weights.get("actorder") in ("group", "dynamic"),
        )


def _strings(group: Any, key: str) -> list[str]:
    values = group.get(key) if isinstance(group, Mapping) else None
    return [v for v in values if isinstance(v, str)] if isinstance(values, list) else []


def _names(target: str, module: str) -> bool:
    if target.startswith("re:"):
        return re.match(target[3:], module) is not None
    return target == module


def _is_class(target: str) -> bool:
    """Whether a target is a module's class ("Linear"), not a name."""
    return "." not in target and not target.startswith("re:")
