"""The tile layout "w4a16.16x64" of the quantised product: a lane reads the codes it multiplies with in one piece.

For each 16 input and 64 output features there are 128 bytes a bit, in planes of up to 16 bytes a lane; `csrc/w4a16.cu`
says which code lies where, which differs by the architecture's fragments.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from ktcore.errors import BackendError
from ktcore_triton.affine import narrow
from ktcore_triton.codes import Codes
from ktcore_triton.native.fragments import Fragments, Places

DEPTH, COLUMNS = 16, 64
Bytes = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class TiledWeight:
    """A weight as the kernel reads it.

    Attributes:
        codes: uint8, the tiles; scale, offset: [groups, padded_n], both float16 where that is exact, else float32.
        fragments: the architecture's.
        n, k: output and input features; group: input features that share a scale; bits: 4 or 8; zero: taken off codes.
    """

    codes: torch.Tensor
    scale: torch.Tensor
    offset: torch.Tensor | None
    fragments: Fragments
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


def tiled(found: Codes, fragments: Fragments, device: torch.device | str = "cpu") -> TiledWeight:
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
    codes = pack(np.pad(found.codes, ((0, pad), (0, 0))), found.bits, fragments)
    return TiledWeight(
        torch.from_numpy(codes).to(device),
        scale.to(device),
        None if offset is None else offset.to(device),
        fragments,
        n,
        k,
        group,
        found.bits,
        found.zero,
    )


def pack(codes: Bytes, bits: int, fragments: Fragments) -> Bytes:
    """uint8 codes [n, k], n and k whole tiles, as tiles [k/16, n/64, 128 * bits] flattened."""
    n, k = codes.shape
    tiles = codes.reshape(n // COLUMNS, COLUMNS, k // DEPTH, DEPTH).transpose(2, 0, 1, 3).reshape(-1, COLUMNS * DEPTH)
    found: Bytes = tiles.take(_order(bits, fragments), axis=1)
    if bits == 4:
        found = found[:, 0::2] | (found[:, 1::2] << np.uint8(4))
    return found.reshape(-1)


def unpack(packed: Bytes, n: int, k: int, bits: int, fragments: Fragments) -> Bytes:
    """The codes [n, k] that `pack` was given."""
    stored = packed.reshape(-1, 128 * bits)
    if bits == 4:
        stored = np.stack((stored & np.uint8(15), stored >> np.uint8(4)), -1).reshape(len(stored), -1)
    tiles = np.empty_like(stored)
    tiles[:, _order(bits, fragments)] = stored
    found = tiles.reshape(k // DEPTH, n // COLUMNS, COLUMNS, DEPTH).transpose(1, 2, 0, 3)
    return np.ascontiguousarray(found).reshape(n, k)


def _order(bits: int, fragments: Fragments) -> Places:
    """Place (column * 16 + k of a tile) of each code, as they follow each other in memory."""
    column, k = fragments.places()
    subtile = np.arange(COLUMNS // 16)[:, None]
    place = ((subtile * 16 + column[:, None]) * DEPTH + k[:, None]).reshape(fragments.lanes, -1)
    # a word's codes: first the low values of its pairs, then the high ones
    word, pairs = 32 // bits, 16 // bits
    slot = np.arange(word)
    words: Places = place.reshape(fragments.lanes, -1, word)[..., slot % pairs * 2 + slot // pairs]
    wide = min(4, words.shape[1])
    planes: Places = words.reshape(fragments.lanes, -1, wide * word).swapaxes(0, 1)
    return planes.reshape(-1)


def _by_group(values: npt.NDArray[np.float32], pad: int) -> npt.NDArray[np.float32]:
    """[n, groups] as [groups, n + pad], zeros in the padding."""
    return np.ascontiguousarray(np.pad(values.T, ((0, 0), (0, pad))))
