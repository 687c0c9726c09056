"""What a caller asks of `ktcore.load`, held against its types before anything is opened."""

from __future__ import annotations

import operator
import os
from collections.abc import Mapping
from typing import Any

from ktcore.engine.prefix.cache import PrefixOptions
from ktcore.errors import RequestError
from ktcore.placement.memory import byte_count
from ktcore.rules.packing import PACKINGS

Memory = int | str | Mapping[str, int | str]
"""Bytes, or words like "24GiB"; or these by device."""


def check_asked(**given: Any) -> None:
    """Refuse what has the wrong type; the names are those of `ktcore.load`.

    Raises:
        RequestError: names the argument, its value and what it should be.
    """
    _is_path("path", given["path"], needed=True)
    for name in ("rules", "experts_from", "packed_cache"):
        _is_path(name, given[name])
    if not isinstance(given["backend"], str) or not given["backend"]:
        raise _wrong("backend", given["backend"], 'a name, such as "cpu", or "auto"')
    if given["packing"] not in (None, *PACKINGS):
        raise _wrong("packing", given["packing"], f"{' or '.join(map(repr, PACKINGS))}, or None")
    for name in ("threads", "context"):
        _is_count(name, given[name])
    if given["progress"] is not None and not callable(given["progress"]):
        raise _wrong("progress", given["progress"], "a function of (name, bytes loaded, bytes in all)")
    if not isinstance(given["graphs"], bool):
        raise _wrong("graphs", given["graphs"], "True or False")
    if given["prefix"] is not None and not isinstance(given["prefix"], PrefixOptions):
        raise _wrong("prefix", given["prefix"], "a PrefixOptions, or None")


def read_memory(given: Memory | None) -> int | dict[str, int] | None:
    """Bytes of memory to stay within, in all or by device, of numbers and words.

    Raises:
        RequestError: it is no size.
    """
    if given is None:
        return None
    if not isinstance(given, Mapping):
        return byte_count("memory", given)
    if not given or not all(isinstance(device, str) for device in given):
        raise _wrong("memory", given, 'a size like "24GiB", or sizes by device: {"cpu": "64GiB"}')
    return {device: byte_count(f"memory[{device!r}]", size) for device, size in given.items()}


def _is_path(name: str, given: Any, needed: bool = False) -> None:
    if given is None and not needed:
        return
    if not isinstance(given, (str, os.PathLike)) or isinstance(given, bytes):
        raise _wrong(name, given, "a path, as str or pathlib.Path")
    if not str(given):
        raise RequestError(f"{name} is empty", "give a path")


def _is_count(name: str, given: Any) -> None:
    if given is None:
        return
    try:
        count = operator.index(given)
    except TypeError:
        count = 0
    if count < 1 or isinstance(given, bool):
        raise _wrong(name, given, "a whole number of at least 1, or None")


def _wrong(name: str, given: Any, wanted: str) -> RequestError:
    said = repr(given)
    return RequestError(
        f"{name} cannot be {said if len(said) <= 60 else said[:57] + '...'} ({type(given).__name__})", f"give {wanted}"
    )
