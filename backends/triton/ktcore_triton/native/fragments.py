"""How each architecture's 16x16x16 product spreads the weights over a warp: the packer's side of `csrc/fragments.h`."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Places = npt.NDArray[np.intp]


@dataclass(frozen=True)
class Fragments:
    """What the packing and the split of the work need to know.

    Attributes:
        name: "nv", "mfma", "wmma11" or "wmma12"; the build defines KT_<NAME>.
        lanes: that hold different weights; elements: weights a lane.
        warps: of a block of the kernel.
    """

    name: str
    lanes: int
    elements: int
    warps: int

    @property
    def macro(self) -> str:
        """The definition that the build gives."""
        return f"-DKT_{self.name.upper()}=1"

    def places(self) -> tuple[Places, Places]:
        """Column and K, of 16 each, of a lane's elements: [lanes, elements] both.

        From the PTX ISA (B of mma.m16n8k16, two side by side) and AMD's ISA documents (B of V_MFMA_F32_16X16X16 and
        V_WMMA_F32_16X16X16).
        """
        lane, e = np.ogrid[: self.lanes, : self.elements]
        if self.name == "nv":
            return lane // 4 + e // 4 * 8, lane % 4 * 2 + e % 2 + e // 2 % 2 * 8
        return lane % 16 + 0 * e, lane // 16 * self.elements + e


FRAGMENTS = {
    found.name: found
    for found in (
        Fragments("nv", 32, 8, 8),
        Fragments("mfma", 64, 4, 4),
        Fragments("wmma11", 16, 16, 4),
        Fragments("wmma12", 32, 8, 4),
    )
}
"""NVIDIA from sm_80; AMD gfx9 from gfx90a; gfx11; gfx12."""
