"""What a plugin registers: an inert description of its backend, and the object behind its lazy entry."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ktcore.backend.capabilities import Capabilities
from ktcore.backend.implementation import Implementation
from ktcore.backend.runtime import DeviceRuntime

API_VERSION = (2, 0)
"""Version of the plugin seam: the major must match, a plugin's minor must not be above."""
OLDER_MAJORS = (1,)
"""Majors that are taken in too. 1 had no `Implementation.handles`: its implementations are trusted with no field that
has a default, whatever they say, and so are refused by name for every spec that uses one."""


@dataclass(frozen=True)
class Probe:
    """Whether a backend can run here. `reason` says why not, or which devices were found."""

    available: bool
    reason: str
    devices: int = 0


@dataclass(frozen=True)
class BackendSpec:
    """An inert description: making one imports no vendor library and touches no device.

    Attributes:
        name: what users type ("cpu"); lower case letters, digits, '-' and '_'.
        api_version: the `API_VERSION` that the plugin was written for.
        requirements: in words, what the backend needs ("a driver of version …, the package …").
        entry: "module:attribute" of a zero-argument callable that returns the `Backend`; imported only when needed.
        probe: says whether the backend can run here; quick, no side effects, never raises for a missing device.
        declared: the device classes it is written for, for planning without hardware; the first is the default.
        accelerator: False for a host backend, which pairs with any accelerator.
        experimental: "auto" never takes it: its author has not yet said that it is worth taking without being named.
        simulated: no hardware stands behind it: "auto" never takes it, and its reports say so.
    """

    name: str
    api_version: tuple[int, int]
    requirements: str
    entry: str
    probe: Callable[[], Probe]
    declared: tuple[Capabilities, ...]
    accelerator: bool = True
    simulated: bool = False
    experimental: bool = False


class Backend(ABC):
    """The object behind `BackendSpec.entry`."""

    @abstractmethod
    def implementations(self) -> Sequence[Implementation]:
        """All implementations, also those whose vendor library is missing here (`supports` says so)."""

    @abstractmethod
    def runtime(self, index: int = 0, threads: int | None = None) -> DeviceRuntime:
        """Open device `index`.

        Args:
            threads: worker threads, for host backends.

        Raises:
            BackendError: with the vendor's own reason.
        """
