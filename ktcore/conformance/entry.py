"""What pytest loads at every start (entry point `pytest11`): the kit's plugin when it is asked for, else nothing."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pytest

KIT = "ktcore.conformance"


def pytest_addoption(parser: pytest.Parser, pluginmanager: pytest.PytestPluginManager) -> None:
    """`pytest --pyargs ktcore.conformance …` gets the kit's options; other runs of pytest never see them."""
    asked = any(word == KIT or word.startswith(f"{KIT}.") for word in sys.argv[1:])
    if asked and not pluginmanager.has_plugin(f"{KIT}.plugin"):
        pluginmanager.import_plugin(f"{KIT}.plugin")
