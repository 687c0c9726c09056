"""Packs unsigned codes into the order in which the lanes of a warp read them, and back.

Each 16 outputs by 64 inputs are one run of bytes: lane after lane, a lane's codes of four products together. The places
of a lane's elements are those of the A fragments in the PTX ISA (mma.m16n8k16) and AMD's MFMA and WMMA ISA documents.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Bytes = npt.NDArray[np.uint8]
Places = npt.NDArray[np.intp]

TILE_N, TILE_K = 64, 128
FLAVOURS = ("nv", "mfma", "wmma11", "wmma12")
"""Fragment layouts: NVIDIA from sm_80; AMD gfx9 with MFMA; gfx11; gfx12."""


@dataclass(frozen=True)
class Packed:
    """Codes uint8 [bytes] in lane order, with the sizes that they stand for; `n` and `k` are not padded."""

    codes: Bytes
    n: int
    k: int
    bits: int
    flavour: str


def pack(codes: Bytes, bits: int, flavour: str) -> Packed:
    """Codes uint8 [n, k], each below 2**bits (4 or 8), for the lanes of `flavour`; padded with zeros to whole tiles."""
    n, k = codes.shape
    padded = np.zeros((-(-n // TILE_N) * TILE_N, -(-k // TILE_K) * TILE_K), np.uint8)
    padded[:n, :k] = codes
    tiles = padded.reshape(-1, 4, 16, padded.shape[1] // 64, 64)  # [tiles of 64, warps, outputs, inputs / 64, inputs]
    tiles = tiles.transpose(0, 3, 1, 2, 4).reshape(tiles.shape[0], -1, 2, 4, 1024)
    tiles = tiles.transpose(0, 1, 3, 2, 4)[..., _order(bits, flavour)]
    if bits == 4:
        tiles = tiles[..., 0::2] | (tiles[..., 1::2] << np.uint8(4))
    return Packed(np.ascontiguousarray(tiles).reshape(-1), n, k, bits, flavour)


def unpack(packed: Packed) -> Bytes:
    """The codes [n, k] that `pack` was given."""
    tiles_n, tiles_k = -(-packed.n // TILE_N), -(-packed.k // TILE_K)
    stored = packed.codes.reshape(tiles_n, tiles_k, 4, 2, -1)
    if packed.bits == 4:
        stored = np.stack((stored & np.uint8(15), stored >> np.uint8(4)), -1).reshape(*stored.shape[:-1], 1024)
    tiles = np.empty_like(stored)
    tiles[..., _order(packed.bits, packed.flavour)] = stored
    tiles = tiles.reshape(tiles_n, tiles_k, 4, 2, 16, 64).transpose(0, 2, 4, 1, 3, 5)
    return np.ascontiguousarray(tiles.reshape(tiles_n * TILE_N, tiles_k * TILE_K)[: packed.n, : packed.k])


def pad_groups(values: npt.NDArray[np.float32], k: int, group: int) -> npt.NDArray[np.float32]:
    """Scales, zeros or offsets [n, groups] as [padded groups, padded n], zeros where padded; `group` 0: one group."""
    n, count = values.shape
    rows = -(-k // TILE_K) * (TILE_K // group) if group else 1
    padded = np.zeros((rows, -(-n // TILE_N) * TILE_N), np.float32)
    padded[:count, :n] = values.T
    return padded


def _order(bits: int, flavour: str) -> Places:
    """Place (output * 64 + input) of each stored code of a 16 by 64 run, in the order of the packed bits."""
    lanes, elements = {"nv": (32, 8), "mfma": (64, 4), "wmma11": (16, 16), "wmma12": (32, 8)}[flavour]
    lane, step, i = np.ogrid[:lanes, :4, :elements]
    if flavour == "nv":
        row = lane // 4 + (i // 2 % 2) * 8
        k = lane % 4 * 2 + i % 2 + (i // 4) * 8
    else:
        row = lane % 16 + 0 * i
        k = lane // 16 * elements + i
    place = (row * 64 + step * 16 + k).reshape(lanes, -1)
    # elements 2p and 2p + 1 of a 32-bit word lie 16 bits apart, so that one mask takes both
    word = 32 // bits
    slots = np.arange(word)
    element = slots % (word // 2) * 2 + slots // (word // 2)
    order: Places = place.reshape(lanes, -1, word)[..., element].reshape(-1)
    return order
