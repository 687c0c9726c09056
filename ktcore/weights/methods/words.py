"""Codes of 1 to 8 bits packed into 32-bit words, earlier codes in lower bits.

Bits that do not divide 32 are packed in two ways: compressed-tensors up to 0.17 leaves the rest of every word empty
(10 codes of 3 bits a word), from 0.18 on codes go on across words (32 codes of b bits in b words). Its files do not say
which, but rows of more than 32 codes take another number of words.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True)
class Packing:
    """How codes lie in words.

    Attributes:
        bits: of a code, 1 to 8.
        dense: codes may lie across two words.
    """

    bits: int
    dense: bool

    def words(self, count: int) -> int:
        """Words that so many codes take."""
        return -(-count * self.bits // 32) if self.dense else -(-count // (32 // self.bits))

    def count(self, words: int) -> int:
        """Codes that so many words have room for."""
        return words * 32 // self.bits if self.dense else words * (32 // self.bits)


def unpack(words: npt.NDArray[Any], packing: Packing) -> npt.NDArray[np.uint8]:
    """uint8 [..., codes] of uint32 [..., words]: as many codes as there is room for."""
    at = np.arange(packing.count(words.shape[-1]))
    if packing.dense:
        word, shift = np.divmod(at * packing.bits, 32)
    else:
        word, shift = np.divmod(at, 32 // packing.bits)
        shift = shift * packing.bits
    wide = words.astype(np.uint64)
    following = np.concatenate([wide[..., 1:], np.zeros_like(wide[..., :1])], axis=-1)
    both = wide | (following << np.uint64(32))
    codes: npt.NDArray[np.uint8] = (
        (both[..., word] >> shift.astype(np.uint64)) & np.uint64(2**packing.bits - 1)
    ).astype(np.uint8)
    return codes
