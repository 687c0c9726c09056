"""The tile layout "w4a16.16x64" of the W4A16 kernel: codes so that a lane reads all it multiplies with in one piece.

For each 16 input and 64 output features there are 512 bytes a plane (one plane of 4-bit codes, two of 8-bit ones), lane
after lane 16 bytes; `csrc/w4a16.cu` says which code lies where.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from ktcore_triton.affine import narrow
from ktcore_triton.codes import Codes

from ktcore.errors import BackendError

DEPTH, COLUMNS = 16, 64
Bytes = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class TiledWeight:
    """A weight as the kernel reads it.

    Attributes:
        codes: uint8, the tiles; scale, offset: [groups, padded_n], both float16 where that is exact, else float32.
        n, k: output and input features; group: input features that share a scale; bits: 4 or 8; zero: taken off codes.
    """

    codes: torch.Tensor
    scale: torch.Tensor
    offset: torch.Tensor | None
    n: int
    k: int
    group: int
    bits: int
    zero: int

    @property
    def padded_n(self) -> int:
        """Output features with those that fill the last tile."""
        return self.scale.shape[1]


def refusal(k: int, group: int) -> str:
    """Why the layout cannot hold a weight of so many input features; empty where it can."""
    if k % DEPTH or group % DEPTH:
        return f"{k} input features in groups of {group}: both must be multiples of {DEPTH}"
    return ""


def tiled(found: Codes, device: torch.device | str = "cpu") -> TiledWeight:
    """Repack codes [n, k] with their scales [n, groups].

    Raises:
        BackendError: sizes that the layout cannot hold.
    """
    n, k = found.codes.shape
    group = k // found.scale.shape[1]
    if why := refusal(k, group):
        raise BackendError(why)
    pad = -n % COLUMNS
    scale, offset = narrow(_by_group(found.scale, pad)), None
    if found.offset is not None:
        offset = narrow(_by_group(found.offset, pad))
        if scale.dtype != offset.dtype:
            scale, offset = scale.float(), offset.float()
    codes = pack(np.pad(found.codes, ((0, pad), (0, 0))), found.bits)
    return TiledWeight(
        torch.from_numpy(codes).to(device),
        scale.to(device),
        None if offset is None else offset.to(device),
        n,
        k,
        group,
        found.bits,
        found.zero,
    )


def pack(codes: Bytes, bits: int) -> Bytes:
    """uint8 codes [n, k], n and k whole tiles, as tiles [k/16, n/64, 512 * planes] flattened."""
    n, k = codes.shape
    # n = (tile, subtile 8, column 8), k = (tile, half 2, quarter 4, pair 2); a lane is (column, quarter)
    split = codes.reshape(n // COLUMNS, 8, 8, k // DEPTH, 2, 4, 2)
    tile, sub, column, deep, half, quarter, pair = range(7)
    if bits == 8:
        found = split.transpose(deep, tile, sub, column, quarter, half, pair)
        # subtiles 0-3 are the first plane, 4-7 the second; a lane's four words lie together
        planes = found.reshape(k // DEPTH, n // COLUMNS, 2, 4, 32, 4).swapaxes(3, 4)
        return np.ascontiguousarray(planes).reshape(-1)
    split = split.reshape(n // COLUMNS, 4, 2, 8, k // DEPTH, 2, 4, 2)
    # (tile, word 4, which 2, column 8, deep, half, quarter, pair): nibble 4 * pair + 2 * which + half of a word
    found = split.transpose(4, 0, 3, 6, 1, 7, 2, 5).reshape(-1, 4, 2)
    return np.ascontiguousarray(found[..., 0] | (found[..., 1] << np.uint8(4))).reshape(-1)


def unpack(packed: Bytes, n: int, k: int, bits: int) -> Bytes:
    """The codes [n, k] that `pack` was given."""
    tiles = (k // DEPTH, n // COLUMNS)
    if bits == 8:
        found = packed.reshape(*tiles, 2, 32, 4, 4).swapaxes(3, 4).reshape(*tiles, 8, 8, 4, 2, 2)
        return np.ascontiguousarray(found.transpose(1, 2, 3, 0, 5, 4, 6)).reshape(n, k)
    nibbles = np.stack((packed & 15, packed >> 4), -1).reshape(*tiles, 8, 4, 4, 2, 2, 2)
    return np.ascontiguousarray(nibbles.transpose(1, 4, 6, 2, 0, 7, 3, 5)).reshape(n, k)


def _by_group(values: npt.NDArray[np.float32], pad: int) -> npt.NDArray[np.float32]:
    """[n, groups] as [groups, n + pad], zeros in the padding."""
    return np.ascontiguousarray(np.pad(values.T, ((0, 0), (0, pad))))
