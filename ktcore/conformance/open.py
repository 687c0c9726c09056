"""Finds a backend and what its plugin declares to the kit."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import entry_points
from typing import Any

import pluggy

from ktcore.backend.hookspecs import ENTRY_POINT_GROUP, PROJECT, HookSpecs
from ktcore.backend.registry import Registry, split_device
from ktcore.conformance.expectations import Expectations
from ktcore.conformance.target import Target
from ktcore.errors import BackendError


def open_target(device: str, plugins: Sequence[str] | None = None) -> Target:
    """The backend of that name ("name" or "name:index"), as installed. Its device is opened at the first use.

    Raises:
        BackendError: it is unknown, incompatible or broken, or its plugin declares nonsense to the kit.
    """
    name, index = split_device(device)
    registry = Registry.discover(plugins)
    record = registry.known(name)
    return Target(registry, name, declared(name, record.distribution), index)


def declared(name: str, distribution: str) -> Expectations:
    """What the plugin that brought a backend declares to the kit; nothing when it has no such hook.

    Raises:
        BackendError: the hook raises, or gives something else.
    """
    found: list[Expectations] = []
    for entry in entry_points(group=ENTRY_POINT_GROUP):
        if entry.dist is not None and f"{entry.dist.name} {entry.dist.version}" == distribution:
            found += expectations_of(entry.load(), name)
    return next((e for e in found if e.backend in (None, name)), Expectations())


def expectations_of(plugin: Any, name: str) -> list[Expectations]:
    """Ask one plugin's hook.

    Raises:
        BackendError: it raises, or gives something else than `Expectations`.
    """
    manager = pluggy.PluginManager(PROJECT)
    manager.add_hookspecs(HookSpecs)
    manager.register(plugin)
    try:
        given = list(manager.hook.ktcore_conformance_expectations())
    except Exception as error:
        raise BackendError(f"backend '{name}': its hook ktcore_conformance_expectations fails: {error}") from error
    flat = [e for item in given for e in (item if isinstance(item, list | tuple) else [item])]
    wrong = [e for e in flat if not isinstance(e, Expectations)]
    if wrong:
        raise BackendError(
            f"backend '{name}': its hook ktcore_conformance_expectations gave a {type(wrong[0]).__name__}",
            "it returns one ktcore.conformance.Expectations, or a list of them",
        )
    return flat
