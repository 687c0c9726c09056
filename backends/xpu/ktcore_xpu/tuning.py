"""Launch shapes of the shared Triton kernels on sub-groups of 16: twice as many as of 32 are the same threads.

Triton-XPU takes its sub-group width from the kernel's matrix instructions, which are 16 wide from Xe-HPC on. From the
chips' sizes; nothing was measured, and nothing compiled with these.
"""

from __future__ import annotations

from dataclasses import replace

from ktcore_triton.tuning import (
    AttentionTiles,
    DeltaTiles,
    Launch,
    LinearTiles,
    Product,
    Tuning,
    attention_tiles,
    expert_tiles,
    linear_tiles,
    spread_over,
)

from ktcore.backend import Capabilities

CORES = {"alchemist": 32, "battlemage": 20, "pvc": 128}
"""Xe cores of the largest chip."""


def tuning(device: Capabilities) -> Tuning:
    """The shapes for a device."""
    cores = CORES.get(str(device.properties.get("arch")), 32)

    def linear(call: Product) -> LinearTiles:
        return spread_over(_doubled(linear_tiles(call.tokens, wide=call.wide)), call, cores)

    def attention(rows: int, value_dim: int) -> AttentionTiles:
        tiles = attention_tiles(rows, value_dim)
        return replace(tiles, launch=_more(tiles.launch))

    return Tuning(
        linear=linear,
        attention=attention,
        experts=lambda tokens: _doubled(expert_tiles(tokens)),
        delta=lambda tokens, width: DeltaTiles(launch=_more(DeltaTiles().launch)),
    )


def _doubled(tiles: LinearTiles) -> LinearTiles:
    return replace(tiles, launch=_more(tiles.launch))


def _more(launch: Launch) -> Launch:
    return replace(launch, warps=2 * launch.warps)
