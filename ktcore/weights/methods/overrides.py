"""What a configuration says of one module: GPTQModel's `dynamic`, and AutoRound's `extra_config`.

Each gives a function from a module's name to the keys that replace the configuration's own for it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from typing import Any

from ktcore.errors import CheckpointError

Overrides = Callable[[str], Mapping[str, Any]]
UNQUANTISED: Mapping[str, Any] = {"bits": 16}
"""What is said of a module that stays as it is."""


def dynamic_overrides(where: str, config: Mapping[str, Any]) -> Overrides:
    """Of `dynamic`: the first rule whose pattern matches a name's start; "-:" before it leaves the module alone.

    "+:" is the same as no mark (GPTQModel, quantization/config.py, dynamic_get).

    Raises:
        CheckpointError: it is no object of objects, or a pattern is no regular expression.
    """
    rules = [
        (
            pattern.startswith("-:"),
            _pattern(where, "dynamic", pattern[2:] if pattern[:2] in ("-:", "+:") else pattern),
            keys,
        )
        for pattern, keys in _table(where, config, "dynamic").items()
    ]

    def of(module: str) -> Mapping[str, Any]:
        for negative, pattern, keys in rules:
            if pattern.match(module):
                return UNQUANTISED if negative else keys
        return {}

    return of


def extra_overrides(where: str, config: Mapping[str, Any], modules: Collection[str] = ()) -> Overrides:
    """Of `extra_config`: a module's own entry, else the first whose pattern is found in its name.

    An entry that names another module is no pattern (AutoRound, inference/utils.py, _expand_regex_config).

    Args:
        modules: names of the checkpoint's modules.

    Raises:
        CheckpointError: it is no object of objects, or a key is neither a module nor a regular expression.
    """
    table = _table(where, config, "extra_config")
    rules = [(_pattern(where, "extra_config", key), keys) for key, keys in table.items() if key not in modules and keys]

    def of(module: str) -> Mapping[str, Any]:
        if module in table:
            return table[module]
        return next((keys for pattern, keys in rules if pattern.search(module)), {})

    return of


def _table(where: str, config: Mapping[str, Any], key: str) -> Mapping[str, Mapping[str, Any]]:
    value = config.get(key) or {}
    if not isinstance(value, Mapping) or not all(isinstance(v, Mapping) for v in value.values()):
        raise CheckpointError(f"{where}: {key} is {value!r:.80}, an object of objects by module is needed")
    return value


def _pattern(where: str, key: str, pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except re.error as error:
        raise CheckpointError(f"{where}: {key} has {pattern!r}, which is no regular expression: {error}") from None
