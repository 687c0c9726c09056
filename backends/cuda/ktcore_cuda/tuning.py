"""Launch shapes of the shared Triton kernels, by what a chip has: processors, and shared memory of a program.

From the chips' sizes and from what compiles without spilling; none of it was measured.
"""

from __future__ import annotations

from ktcore_triton.tuning import AttentionTiles, Launch, LinearTiles, Product, Tuning, linear_tiles, spread_over

from ktcore.backend import Capabilities

PROCESSORS = {"sm_80": 108, "sm_86": 84, "sm_89": 128, "sm_90": 132, "sm_120": 170}
"""Streaming multiprocessors of the largest chip, where the driver does not say."""
ROOMY = ("sm_80", "sm_90")
"""163 and 227 KiB of shared memory a program; the others have 99."""


def tuning(device: Capabilities) -> Tuning:
    """The shapes for a device."""
    arch = str(device.properties.get("arch", "sm_80"))
    processors = int(device.properties.get("processors", PROCESSORS.get(arch, 108)))
    roomy = arch in ROOMY

    def linear(call: Product) -> LinearTiles:
        tiles = linear_tiles(call.tokens, wide=call.wide)
        if call.tokens > 64 and not call.wide:
            tiles = LinearTiles(64, 64, launch=Launch(warps=8, stages=3 if roomy else 2))
        return spread_over(tiles, call, processors)

    def attention(rows: int, value_dim: int) -> AttentionTiles:
        if value_dim > 256:
            return AttentionTiles(16, 16, 16 if processors > 100 else 8, Launch(warps=8, stages=1))
        if rows <= 64:
            return AttentionTiles(16, 32, 8, Launch(warps=4, stages=2 if roomy else 1))
        return AttentionTiles(64 if roomy else 32, 32, 1, Launch(warps=8, stages=1))

    return Tuning(linear=linear, attention=attention)
