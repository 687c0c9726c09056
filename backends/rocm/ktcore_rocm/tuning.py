"""Launch shapes of the shared Triton kernels: wavefronts of 64 on gfx9, of 32 on gfx11 and gfx12.

From the chips' sizes and from what compiles without spilling; none of it was measured. Half as many wavefronts of twice
the width are the same threads; the tile of a matrix instruction, 16 by 16, feeds few of them.
"""

from __future__ import annotations

from ktcore_triton.tuning import (
    AttentionTiles,
    DeltaTiles,
    Launch,
    LinearTiles,
    Product,
    Tuning,
    linear_tiles,
    spread_over,
)

from ktcore.backend import Capabilities

UNITS = {"gfx90a": 104, "gfx942": 304, "gfx950": 256, "gfx1100": 96, "gfx1201": 64}
"""Compute units of the largest chip (of a die of gfx90a, which is a device of its own)."""
KEY_PART = 64
"""RDNA's 256 registers do not hold latent keys 512 wide: they are multiplied in such parts."""


def tuning(device: Capabilities) -> Tuning:
    """The shapes for a device."""
    units = int(device.properties.get("processors", UNITS.get(str(device.properties.get("arch")), 64)))
    return _wide(units) if device.properties.get("subgroup", 64) == 64 else _narrow(units)


def _wide(units: int) -> Tuning:
    def linear(call: Product) -> LinearTiles:
        few = LinearTiles(16, 32, launch=Launch(warps=2))
        many = LinearTiles(32, 32, launch=Launch(warps=4)) if call.wide else LinearTiles(64, 64, launch=Launch(warps=4))
        return spread_over(few if call.tokens <= 16 else many, call, units)

    def attention(rows: int, value_dim: int) -> AttentionTiles:
        if rows <= 64 or value_dim > 256:
            return AttentionTiles(16, 16, 16 if units > 200 else 8, Launch(warps=4, stages=1))
        return AttentionTiles(32, 32, 1, Launch(warps=4, stages=1))

    return Tuning(
        linear=linear,
        attention=attention,
        experts=lambda tokens: LinearTiles(16, 32, launch=Launch(warps=2)),
        delta=lambda tokens, width: DeltaTiles(launch=Launch(warps=4, stages=1)),
    )


def _narrow(units: int) -> Tuning:
    def attention(rows: int, value_dim: int) -> AttentionTiles:
        if value_dim > 256:
            return AttentionTiles(16, 16, 8, Launch(warps=8, stages=1), KEY_PART)
        if rows <= 64:
            return AttentionTiles(16, 16, 8, Launch(warps=8, stages=1))
        return AttentionTiles(32, 16, 1, Launch(warps=8, stages=1))

    return Tuning(
        linear=lambda call: spread_over(linear_tiles(call.tokens, wide=call.wide), call, units), attention=attention
    )
