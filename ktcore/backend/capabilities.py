"""What a device can do, as its backend declares it (for planning without hardware) or reports it (live)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Capabilities:
    """A device as rules and `supports()` see it.

    Attributes:
        backend: name of the backend that owns the device.
        name: the device's name, or a description of the class of devices when declared.
        memory_bytes: device memory; None when unknown or shared with the host.
        features: open strings such as "bf16", "fp8:e4m3fn", "int8_dot", "host_callback:capturable"; a backend may add
            its own with a prefix.
        properties: numbers and strings that kernels choose by (subgroup size, KV page sizes …).
        live: False when declared by the plugin and not read from a device.
    """

    backend: str
    name: str
    memory_bytes: int | None = None
    features: frozenset[str] = frozenset()
    properties: Mapping[str, str | int | float] = field(default_factory=dict)
    live: bool = False

    def has(self, feature: str) -> bool:
        """Whether the feature is declared."""
        return feature in self.features
