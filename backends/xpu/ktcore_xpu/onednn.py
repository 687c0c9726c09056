"""Linear projection by the int4 product of vllm-xpu-kernels (oneDNN), where that package is installed."""

from __future__ import annotations

import importlib
from importlib.util import find_spec
from typing import Any, cast

import numpy as np
import torch
from ktcore_triton.codes import Codes, unpack

from ktcore.backend import Capabilities, Implementation, LoadRequest, Module, Supported, Unsupported
from ktcore.backend.mirror import upload
from ktcore.errors import BackendError
from ktcore.ops.linear import LinearSpec

PACKAGE = "vllm_xpu_kernels"
FORMATS = ("Q4_0", *(f"INT4_G{group}{order}" for group in (32, 64, 128) for order in ("", "_ORDERED")))
SYMMETRIC = 8


class OneDnnLinear(Implementation):
    """4-bit codes with integer zero points, in float16: the only activation type that the package's own tests cover."""

    id = "xpu.onednn_w4a16"
    spec_type = LinearSpec
    handles = frozenset({"bias"})

    def supports(self, spec: LinearSpec, device: Capabilities) -> Supported | Unsupported:
        """Where vllm-xpu-kernels is installed; without a live device, that it will be."""
        if spec.weight_format not in FORMATS:
            return Unsupported(f"weight format {spec.weight_format}: it takes {', '.join(FORMATS)}")
        if spec.out_features % 8:
            return Unsupported(f"{spec.out_features} output features: zero points are packed by eight")
        if device.live and find_spec(PACKAGE) is None:
            return Unsupported("vllm-xpu-kernels is not installed")
        return Supported()

    def load(self, request: LoadRequest) -> Module:
        """Repack as the product takes it."""
        return OneDnnLinearModule(request)


class OneDnnLinearModule:
    """float32 [T, in] -> float32 [T, out].

    The call is `torch.ops._xpu_C.int4_gemm_w4a16(A, B, bias, B_scale, B_zp, group_size, g_idx)` of vllm-xpu-kernels
    (csrc/xpu/torch_bindings.cpp and csrc/xpu/onednn at 4543b580): A [M, K] float16; B int32 of shape [K/8, N] with K
    contiguous, the earlier of eight codes in the lower bits; B_scale [K/g, N]; B_zp one int8 8 for symmetric codes, or
    packed true zero points [K/g, N/8]. Permuted columns are put in order before the call, not by g_idx.
    """

    layout = "onednn.w4a16"

    def __init__(self, request: LoadRequest) -> None:
        importlib.import_module(f"{PACKAGE}._xpu_C")
        spec = cast(LinearSpec, request.spec)
        stored, device = request.weights["weight"], request.runtime.device
        raw = np.frombuffer(stored.raw(), np.uint8).reshape(spec.out_features, -1)
        found = unpack(spec.weight_format, raw)
        packed, scale, zero = (torch.from_numpy(part).to(device) for part in onednn_layout(found, request.name))
        self._packed, self._scale, self._zero = packed.t(), scale, zero
        self._group = spec.in_features // found.scale.shape[1]
        order = stored.input_order
        self._order = None if order is None else upload(request.runtime, torch.from_numpy(order))
        self._none = torch.empty(0, dtype=torch.float16, device=device)
        self._bias = request.weights["bias"].tensor().float().to(device) if "bias" in request.weights else None

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        x = x if self._order is None else x.index_select(1, self._order)
        ops: Any = torch.ops._xpu_C
        y = ops.int4_gemm_w4a16(
            x.half().contiguous(), self._packed, self._none, self._scale, self._zero, self._group, None
        ).float()
        return cast(torch.Tensor, y if self._bias is None else y + self._bias)


def onednn_layout(found: Codes, name: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Codes int32 [N, K/8], scales float16 [K/g, N], and zero points: int8 [1] or int32 [K/g, N/8].

    Raises:
        BackendError: a scale that float16 cannot hold, or zero points that are no integers from 0 to 15.
    """
    scale = found.scale.T.astype(np.float16)
    if not np.isfinite(scale).all():
        raise BackendError(f"{name}: a scale is too large for float16", "choose another implementation of linear")
    packed = _nibbles(found.codes)
    if found.offset is None and found.zero == SYMMETRIC:
        return packed, np.ascontiguousarray(scale), np.array([SYMMETRIC], np.int8)
    if found.offset is None:
        zero = np.full(found.scale.shape, found.zero, np.float32)
    else:
        # a scale of 0 makes every value 0 whatever its zero point
        zero = np.divide(-found.offset, found.scale, out=np.zeros_like(found.scale), where=found.scale != 0)
    whole = np.rint(zero)
    if np.abs(whole - zero).max() > 1e-3 or whole.min() < 0 or whole.max() > 15:
        raise BackendError(f"{name}: zero points are no integers from 0 to 15", "choose another implementation")
    return packed, np.ascontiguousarray(scale), _nibbles(np.ascontiguousarray(whole.T.astype(np.uint8)))


def _nibbles(codes: np.ndarray) -> np.ndarray:
    """uint8 codes [rows, cols] below 16, eight in an int32: [rows, cols / 8], the earlier in the lower bits."""
    eight = codes.reshape(codes.shape[0], -1, 8).astype(np.uint32)
    words: np.ndarray = np.bitwise_or.reduce(eight << (4 * np.arange(8, dtype=np.uint32)), axis=-1)
    return words.view(np.int32)
