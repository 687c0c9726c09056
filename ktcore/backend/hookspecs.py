"""The hooks that ktcore calls on plugins (pluggy). Few hooks, a rich object: nearly all lies in `BackendSpec`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pluggy

from ktcore.backend.spec import BackendSpec

PROJECT = "ktcore"
ENTRY_POINT_GROUP = "ktcore.backends"

hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)


class HookSpecs:
    """Hooks of a backend plugin: a module or object named by an entry point of group `ktcore.backends`."""

    @hookspec
    def ktcore_register_backends(self) -> list[BackendSpec]:  # type: ignore[empty-body]
        """The backends that this plugin brings. Called once a registry; must be quick and import no vendor library."""

    @hookspec
    def ktcore_rule_paths(self) -> list[Path]:  # type: ignore[empty-body]
        """Folders with rule files (`<backend>.yaml` overlays) that are searched after the shipped ones. Optional."""

    @hookspec
    def ktcore_conformance_expectations(self) -> Any:
        """What the conformance kit should know: a `ktcore.conformance.Expectations`, or a list, one a backend.

        Known gaps with their reasons, declared precisions, whether the device is real. Optional."""
