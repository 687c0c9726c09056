"""Pytest plugin: the tests meet the native module at KTCORE_NATIVE (environment), not the built one."""

from __future__ import annotations

import importlib.util
import os
import sys
from importlib.machinery import ExtensionFileLoader
from types import ModuleType

import ktcore_cpu
import pytest

NAME = "ktcore_cpu._native"
PATH = os.environ["KTCORE_NATIVE"]
UNITS = [unit for unit in os.environ.get("KTCORE_SANITIZE_UNITS", "").split(",") if unit]


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out tests of instruction sets that KTCORE_SANITIZE_UNITS (names, commas between) does not name."""
    if not UNITS:
        return
    kept, out = [], []
    for item in items:
        isa = getattr(item, "callspec", None) and item.callspec.params.get("isa")  # type: ignore[attr-defined]
        (out if isa and isa not in UNITS else kept).append(item)
    config.hook.pytest_deselected(items=out)
    items[:] = kept


def pytest_sessionfinish() -> None:
    """A run on the wrong module would find nothing wrong."""
    natives = [vars(m).get("_native") for m in list(sys.modules.values()) if isinstance(m, ModuleType)]
    used = {n.__file__ for n in natives if isinstance(n, ModuleType) and n.__name__ == NAME}
    assert used == {PATH}, used


def _install() -> None:
    assert NAME not in sys.modules, "the package's own module is loaded already"
    spec = importlib.util.spec_from_file_location(NAME, PATH, loader=ExtensionFileLoader(NAME, PATH))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if UNITS:  # the build is without the others
        here = [unit for unit in module.isa_supported() if unit in ("scalar", *UNITS)]
        module.isa_supported = lambda: here  # type: ignore[attr-defined]
    sys.modules[NAME] = module
    ktcore_cpu._native = module  # type: ignore[attr-defined]


# At import: conftest files, which pytest reads before it calls any hook of a plugin, import it already.
_install()
