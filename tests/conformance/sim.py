"""The simulated accelerator as a target, with its runtime or its implementations exchanged for broken ones."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from ktcore.backend import Backend, Implementation, LoadRequest, Registry
from ktcore.backend.discovery import Found
from ktcore.backend.record import BackendRecord
from ktcore.conformance.open import expectations_of
from ktcore.conformance.target import Target
from ktcore.ops import Spec

FOLDER = Path(__file__).parents[2] / "backends" / "sim"
Change = Callable[[Implementation, LoadRequest], Any]


class Broken(Implementation):
    """An implementation of the simulated device that loads something else."""

    def __init__(self, right: Implementation, load: Change) -> None:
        self.id, self.spec_type, self.fused, self.options = right.id, right.spec_type, right.fused, right.options
        self.handles = right.handles
        self._right, self._load = right, load

    def supports(self, spec: Any, device: Any) -> Any:
        return self._right.supports(spec, device)

    def load(self, request: LoadRequest) -> Any:
        return self._load(self._right, request)

    def page_sizes(self, spec: Any) -> tuple[int, ...]:
        return self._right.page_sizes(spec)

    def cache_bytes_per_token(self, spec: Any) -> int:
        return self._right.cache_bytes_per_token(spec)


def sim_target(
    runtime: Callable[[type], type] = lambda right: right,
    changes: dict[type[Spec], Change] | None = None,
    delay_us: float = 300.0,
    seed: int = 0,
) -> Target:
    """A simulated device with delays, broken as asked; skips where its native half is not built."""
    if "ktcore_sim" not in sys.modules and str(FOLDER) not in sys.path:
        sys.path.append(str(FOLDER))
    plugin = pytest.importorskip("ktcore_sim.plugin")
    spec = plugin.ktcore_register_backends()[0]
    probed = spec.probe()
    if not probed.available:
        pytest.skip(probed.reason)
    from ktcore_sim.backend import SimBackend
    from ktcore_sim.options import SimOptions
    from ktcore_sim.runtime import SimRuntime

    options = SimOptions(delay_us=delay_us, seed=seed)
    kind = runtime(SimRuntime)

    class Backends(SimBackend):  # type: ignore[misc]
        def implementations(self) -> Sequence[Implementation]:
            return [
                Broken(i, changes[i.spec_type]) if changes and i.spec_type in changes else i
                for i in super().implementations()
            ]

        def runtime(self, index: int = 0, threads: int | None = None) -> Any:
            return kind(index, options)

    home = ModuleType("ktcore_sim_under_test")
    home.make = Backends  # type: ignore[attr-defined]
    sys.modules[home.__name__] = home
    from dataclasses import replace

    record = BackendRecord("sim", "sim 0", replace(spec, entry=f"{home.__name__}:make"))
    assert issubclass(Backends, Backend)
    return Target(Registry([Found((record,))]), "sim", expectations_of(plugin, "sim")[0])
