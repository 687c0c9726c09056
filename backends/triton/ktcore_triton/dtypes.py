"""Triton's names of torch's types."""

from __future__ import annotations

from typing import Any

import torch
import triton.language as tl

from ktcore.errors import BackendError


def compute_type(dtype: torch.dtype) -> Any:
    """The type that products are computed in.

    Raises:
        BackendError: not float16, bfloat16 or float32.
    """
    types = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}
    if dtype not in types:
        raise BackendError(f"kernels compute in float16, bfloat16 or float32, not in {dtype}")
    return types[dtype]


def float8_type(dtype: torch.dtype) -> Any:
    """Triton's name of an 8-bit float with 3 bits of mantissa."""
    return {torch.float8_e4m3fn: tl.float8e4nv, torch.float8_e4m3fnuz: tl.float8e4b8}[dtype]
