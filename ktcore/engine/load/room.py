"""Refuses a context that this machine's memory cannot hold, before anything is loaded for it."""

from __future__ import annotations

import psutil

from ktcore.backend.registry import Registry, split_device
from ktcore.errors import PlanError
from ktcore.placement.memory import human_bytes
from ktcore.placement.topology import read_topology
from ktcore.rules.plan import Plan

_SHARE = 0.75


def room_for_weights() -> int:
    """Bytes of files that can be brought into memory without driving others out: caches are yet to be filled."""
    return int(_SHARE * min(psutil.virtual_memory().available, read_topology().usable_memory))


def check_room(plan: Plan, registry: Registry, context: int, mapped: bool, usable: int | None = None) -> None:
    """Hold what a context allocates on host devices against the machine's memory; accelerators' is the plan's affair.

    Weights that do not fit are no reason to refuse: where they are mapped from files the system can read them again.

    Args:
        context: tokens of KV cache.
        mapped: packed weights are mapped from files, and so take no room of their own.
        usable: bytes that this process may have; None asks the machine.

    Raises:
        PlanError: the context does not fit; says the largest that does.
    """
    for device, need in plan.memory(context).items():
        if need.limit is not None or registry.known(split_device(device)[0]).accelerator:
            continue
        limit = read_topology().usable_memory if usable is None else usable
        other = need.workspace + (need.weights if not mapped and need.weights + need.workspace < limit else 0)
        if other + need.kv <= limit:
            continue
        largest = plan.largest_context(device, limit - other)
        raise PlanError(
            f"a context of {context} tokens needs {human_bytes(need.kv)} of KV cache on {device}, beside "
            f"{human_bytes(other)} for the rest: more than the {human_bytes(limit)} of this machine",
            f"a context of {largest} tokens fits" if largest else "take a smaller model: no context fits beside it",
        )
