"""What the simulated device can do, declared and live."""

from __future__ import annotations

from ktcore.backend import Capabilities
from ktcore_sim.options import SimOptions

PAGE_SIZES = (64, 16, 32, 128, 256)
"""Tokens a KV page; any size would do, these are the ones in use."""


def describe(options: SimOptions, live: bool = False) -> Capabilities:
    """Capabilities of a device that is run with `options`."""
    return Capabilities(
        backend="sim",
        name="simulated accelerator",
        memory_bytes=options.memory,
        features=frozenset(
            {
                "simulated",
                "f32",
                "f16",
                "bf16",
                f"host_callback:{options.host_callback.value}",
                f"graph:{options.graph.value}",
            }
        ),
        properties={"subgroup": 1, "kv_page_size": PAGE_SIZES[0]},
        live=live,
    )
