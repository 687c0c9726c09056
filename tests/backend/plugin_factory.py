"""Writes installable plugins into a folder: a module and the metadata that makes its entry point discoverable."""

from __future__ import annotations

import sys
from pathlib import Path
from textwrap import dedent

GOOD = """
from ktcore.backend import BackendSpec, Capabilities, Probe, hookimpl

def probe():
    {probe}

@hookimpl
def ktcore_register_backends():
    caps = Capabilities("{name}", "a {name} device", None, frozenset({{"bf16"}}))
    return [BackendSpec("{name}", {api}, "a {name} card", "{module}_impl:make", probe, (caps,), {accelerator})]
"""
IMPL = """
from ktcore.backend import Backend
from ktcore.backend.host import HostRuntime
from ktcore.backend.reference import reference_implementations

class Made(Backend):
    def implementations(self):
        items = [item for item in reference_implementations() if item.id in {ids}]
        for item in items:
            item.id = item.id.replace("reference", "{prefix}")
        return items

    def runtime(self, index=0, threads=None):
        if index > 1:
            raise RuntimeError("only two cards")
        return HostRuntime()

make = Made
"""


class PluginFactory:
    """Plugins in `folder`, which must be on `sys.path`; module names are unique, so that tests do not meet."""

    count = 0

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.names: list[str] = []

    def add(self, name: str, source: str, *, package: str | None = None, version: str = "1.0") -> str:
        """A plugin whose module holds `source`; returns the module's name."""
        PluginFactory.count += 1
        module = f"made_plugin_{PluginFactory.count}"
        (self.folder / f"{module}.py").write_text(dedent(source).replace("{module}", module))
        package = package or f"pkg-{name}"
        info = self.folder / f"{package.replace('-', '_')}_{PluginFactory.count}-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: {version}\n")
        (info / "entry_points.txt").write_text(f"[ktcore.backends]\n{name} = {module}\n")
        self.names.append(name)
        return module

    def good(
        self,
        name: str,
        *,
        probe: str = 'return Probe(True, "one card", 1)',
        api: str = "(2, 0)",
        accelerator: bool = True,
        ids: tuple[str, ...] = ("reference.linear",),
        prefix: str | None = None,
        entry_name: str | None = None,
        package: str | None = None,
    ) -> str:
        """A plugin that registers one backend."""
        source = GOOD.format(name=name, probe=probe, api=api, accelerator=accelerator, module="{module}")
        module = self.add(entry_name or name, source, package=package)
        impl = IMPL.format(ids=ids, prefix=prefix or name)
        (self.folder / f"{module}_impl.py").write_text(impl)
        return module

    def forget(self) -> None:
        """Take the modules out of `sys.modules`."""
        for name in [name for name in sys.modules if name.startswith("made_plugin_")]:
            del sys.modules[name]
