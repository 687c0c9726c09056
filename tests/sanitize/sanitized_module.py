"""Pytest plugin: the tests meet the native module at KTCORE_NATIVE (environment), not the built one."""

from __future__ import annotations

import importlib.util
import os
import sys
from importlib.machinery import ExtensionFileLoader

import ktcore_cpu

NAME = "ktcore_cpu._native"


def pytest_configure() -> None:
    """Loads it before any test imports the package's own."""
    path = os.environ["KTCORE_NATIVE"]
    spec = importlib.util.spec_from_file_location(NAME, path, loader=ExtensionFileLoader(NAME, path))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.modules[NAME] = module
    ktcore_cpu._native = module  # type: ignore[attr-defined]
