"""The C entry points of the quantised product, loaded with ctypes; pointers and sizes only, no tensors."""

from __future__ import annotations

import ctypes
from pathlib import Path


class Arguments(ctypes.Structure):
    """`kt_gemm_args` of csrc/gemm.cu."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("x", "codes", "scale", "extra", "bias", "y", "counters", "partial")),
        ("stream", ctypes.c_void_p),
        *((name, ctypes.c_int32) for name in ("m", "n", "k", "group", "kind", "zero", "bits", "bf16", "blocks")),
        ("warp_size", ctypes.c_int32),
    ]


class Library:
    """A built shared library of csrc/gemm.cu."""

    def __init__(self, path: Path) -> None:
        loaded = ctypes.CDLL(str(path))
        self._gemm = loaded.kt_gemm
        self._gemm.argtypes = [ctypes.POINTER(Arguments)]
        self._counters, self._partial = loaded.kt_gemm_counters, loaded.kt_gemm_partial
        for function in (self._counters, self._partial):
            function.restype = ctypes.c_int64
            function.argtypes = [ctypes.c_int32, ctypes.c_int32]

    def gemm(self, arguments: Arguments) -> int:
        """0; -1 for arguments that do not fit together; else the runtime's error number."""
        return int(self._gemm(ctypes.byref(arguments)))

    def counter_bytes(self, m: int, n: int) -> int:
        """Bytes that must be zero before the first call; each call leaves zeros."""
        return int(self._counters(m, n))

    def partial_bytes(self, m: int, blocks: int) -> int:
        """Bytes of partial sums."""
        return int(self._partial(m, blocks))


def zero_word(zero: int, bits: int, bf16: bool) -> int:
    """The common zero point as the kernel takes it: plus its decoder's bias, twice, in 16 bits each."""
    return int(encode_zero(zero, bits, bf16)) * 0x10001


def encode_zero(zero: int, bits: int, bf16: bool) -> int:
    """Bits of a zero point plus the bias that the decoder leaves on codes (1024; bfloat16: 128, of 8 bits none)."""
    import torch

    bias = decoder_bias(bits, bf16)
    value = torch.tensor([zero + bias], dtype=torch.bfloat16 if bf16 else torch.float16)
    return int(value.view(torch.int16).item())


def decoder_bias(bits: int, bf16: bool) -> int:
    """What the decoder leaves added to the codes."""
    return (128 if bits == 4 else 0) if bf16 else 1024
