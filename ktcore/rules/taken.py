"""Which backend a plan took, on which devices, and why: said once, by whoever started it, in the same words."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ktcore.backend.registry import split_device
from ktcore.rules.plan import Plan


@dataclass(frozen=True)
class Taken:
    """What a plan runs on. As text it is a sentence or two for users.

    Attributes:
        backend: the backend's name.
        device: the backend's device, "name:index".
        devices: every device that the plan uses -> what it is called; the backend's own first.
        why: why this backend was taken, as `Registry.choose` says it.
    """

    backend: str
    device: str
    devices: Mapping[str, str]
    why: str

    def __str__(self) -> str:
        used = " and on ".join(f"{device}, {name}" for device, name in self.devices.items())
        unused = "" if self.device in self.devices else f" The rules put nothing on {self.device}."
        return f"Runs on {used}. {self.why}{unused}"


def taken(plan: Plan, why: str) -> Taken:
    """What `plan` took; `why` is the reason that came with the backend (`Prepared.backend_reason`)."""
    backend, index = split_device(plan.backend)
    device = f"{backend}:{index}"
    used = sorted(plan.devices, key=lambda d: d != device)
    return Taken(backend, device, {d: plan.device_names.get(d, d) for d in used}, why)
