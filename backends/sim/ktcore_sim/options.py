"""How a simulated device behaves: delays, memory, callbacks; from the environment or given in code."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, field, fields
from typing import Any

from ktcore.backend import GraphMode, HostCallbackMode
from ktcore.errors import BackendError

PREFIX = "KTCORE_SIM_"
DEFAULT_MEMORY = 8 << 30
DEFAULT_DEVICES = 2
MOST_DEVICES = 16


@dataclass(frozen=True)
class SimOptions:
    """One device as a runtime opens it. Each field is read from `KTCORE_SIM_<FIELD>` unless given.

    Attributes:
        memory: bytes that live tensors may take ("8GiB", "512MiB", or a number).
        seed: of the delays; the same seed draws the same ones for the same work.
        delay_us: each launch, copy and host call starts up to so many microseconds late.
        latency_us: each launch takes at least so many microseconds more.
        host_callback: "none", "eager" or "capturable".
        graph: "none" or "capture".
        host_touch: what a host access to device memory does: "abort" reports it and lets the process die as on a real
            device, "count" counts it and goes on.
    """

    memory: int = DEFAULT_MEMORY
    seed: int = 0
    delay_us: float = 0.0
    latency_us: float = 0.0
    host_callback: HostCallbackMode = HostCallbackMode.CAPTURABLE
    graph: GraphMode = GraphMode.CAPTURE
    host_touch: str = field(default="abort")

    @classmethod
    def from_environment(cls, **given: Any) -> SimOptions:
        """Fields that are given, the environment's for the others, then the defaults.

        Raises:
            BackendError: a variable holds something that cannot be read.
        """
        values: dict[str, Any] = {}
        for f in fields(cls):
            text = os.environ.get(PREFIX + f.name.upper())
            if f.name not in given and text is not None:
                values[f.name] = _parse(f.name, text)
        return cls(**values, **given)


def devices() -> int:
    """How many devices there are (`KTCORE_SIM_DEVICES`, default 2)."""
    text = os.environ.get(f"{PREFIX}DEVICES", str(DEFAULT_DEVICES))
    if not text.isdecimal() or int(text) > MOST_DEVICES:
        raise BackendError(f"{PREFIX}DEVICES={text!r} is no number from 0 to {MOST_DEVICES}")
    return int(text)


def _parse(name: str, text: str) -> Any:
    try:
        if name == "memory":
            return _bytes(text)
        if name == "seed":
            return int(text)
        if name in ("delay_us", "latency_us"):
            return float(text)
        if name == "host_callback":
            return HostCallbackMode(text)
        if name == "graph":
            return GraphMode(text)
        if text not in ("abort", "count"):
            raise ValueError("known are abort and count")
        return text
    except ValueError as error:
        raise BackendError(f"{PREFIX}{name.upper()}={text!r} cannot be read: {error}") from error


def _bytes(text: str) -> int:
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMG]?)(?:i?B)?\s*", text)
    if found is None:
        raise ValueError('write "8GiB", "512MiB" or a number of bytes')
    return int(float(found[1]) * 1024 ** " KMG".index(found[2] or " "))
