"""Finds plugins by entry point and takes in one at a time, so that a broken one cannot break another."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path

import pluggy

from ktcore.backend.hookspecs import ENTRY_POINT_GROUP, PROJECT, HookSpecs
from ktcore.backend.record import BackendRecord, BackendState, broken
from ktcore.backend.spec import API_VERSION, OLDER_MAJORS, BackendSpec
from ktcore.errors import BackendError

PLUGINS_VARIABLE = "KTCORE_PLUGINS"
"""Environment variable: a comma list of the plugins to load, all others are left alone; empty loads none."""
RESERVED = ("reference", "host", "accelerator", "auto")
"""Names that mean something else in rules or on the command line."""

_NAME = re.compile(r"[a-z][a-z0-9_-]*")


@dataclass(frozen=True)
class Found:
    """What one plugin gave."""

    records: tuple[BackendRecord, ...]
    rule_paths: tuple[Path, ...] = ()


def find_plugins(only: Sequence[str] | None = None) -> list[Found]:
    """Load the entry points of group `ktcore.backends`, sorted by name.

    Args:
        only: names of plugins to load; None reads the environment variable, and without it takes all.

    Raises:
        BackendError: `only` or the variable names a plugin that is not installed.
    """
    installed = sorted(entry_points(group=ENTRY_POINT_GROUP), key=lambda e: (e.name, _distribution(e)))
    wanted = _wanted(only)
    if wanted is not None:
        names = {entry.name for entry in installed}
        missing = [name for name in wanted if name not in names]
        if missing:
            raise BackendError(
                f"plugin '{missing[0]}' was asked for, but is not installed",
                f"installed: {', '.join(sorted(names)) or 'none'}; see the variable {PLUGINS_VARIABLE}",
            )
        installed = [entry for entry in installed if entry.name in wanted]
    return [take_in(entry) for entry in installed]


def take_in(entry: EntryPoint) -> Found:
    """Load one entry point and ask its hooks; whatever it raises ends up in a BROKEN record."""
    source = _distribution(entry)
    try:
        plugin = entry.load()
        # a manager of its own for each plugin: one that raises stops nobody else's hook call
        manager = pluggy.PluginManager(PROJECT)
        manager.add_hookspecs(HookSpecs)
        manager.register(plugin, entry.name)
        manager.check_pending()
        specs = [spec for given in manager.hook.ktcore_register_backends() for spec in given]
        paths = tuple(Path(path) for given in manager.hook.ktcore_rule_paths() for path in given)
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        record = BackendRecord(entry.name, source)
        record._verdict = broken(error, "its plugin does not load")
        return Found((record,))
    if not specs:
        return Found((_failed(entry.name, source, "its plugin registers no backend"),), paths)
    return Found(tuple(_record(spec, entry.name, source) for spec in specs), paths)


def _record(spec: object, entry_name: str, source: str) -> BackendRecord:
    if not isinstance(spec, BackendSpec):
        return _failed(entry_name, source, f"its plugin registered a {type(spec).__name__} instead of a BackendSpec")
    record = BackendRecord(spec.name, source, spec)
    wrong = _mistake(spec)
    if wrong:
        record.fail(BackendState.BROKEN, wrong)
    elif not compatible(spec.api_version):
        record.fail(
            BackendState.INCOMPATIBLE,
            f"it was written for plugin API {_dotted(spec.api_version)}, this ktcore has {_dotted(API_VERSION)}: "
            + ("update ktcore" if spec.api_version > API_VERSION else f"update {source.split(' ')[0]}"),
        )
    return record


def compatible(version: tuple[int, int]) -> bool:
    """Whether a plugin that was written for API `version` is taken in."""
    major, minor = version
    return major in OLDER_MAJORS or (major == API_VERSION[0] and minor <= API_VERSION[1])


def _mistake(spec: BackendSpec) -> str | None:
    if not _NAME.fullmatch(spec.name):
        return f"its name {spec.name!r} may hold only lower case letters, digits, '-' and '_'"
    if spec.name in RESERVED:
        return f"the name '{spec.name}' is reserved"
    if not spec.declared:
        return "it declares no device class"
    if spec.entry.count(":") != 1:
        return f"its entry {spec.entry!r} is not of the form 'module:attribute'"
    return None


def _failed(name: str, source: str, reason: str) -> BackendRecord:
    record = BackendRecord(name, source)
    record.fail(BackendState.BROKEN, reason)
    return record


def _wanted(only: Sequence[str] | None) -> list[str] | None:
    if only is not None:
        return list(only)
    text = os.environ.get(PLUGINS_VARIABLE)
    return None if text is None else [name.strip() for name in text.split(",") if name.strip()]


def _distribution(entry: EntryPoint) -> str:
    return f"{entry.dist.name} {entry.dist.version}" if entry.dist is not None else "an unknown package"


def _dotted(version: tuple[int, int]) -> str:
    return ".".join(str(part) for part in version)
